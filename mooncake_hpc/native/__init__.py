"""The ground of the kernels: compilation and its cache, atomics, sockets, address ranges, spinning, digests."""
