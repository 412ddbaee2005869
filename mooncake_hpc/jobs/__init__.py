"""Ranks and what starts them: MPI, launchers, hosts, failure reports, a job's etcd, the kernel cache of a node."""
