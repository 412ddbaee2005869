"""The control plane beside the data: the original's RPC frames, a server and a client, the directory."""
