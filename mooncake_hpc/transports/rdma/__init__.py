"""RDMA: the original's handshake and queue pairs; pyverbs sets them up, numba posts and polls."""
