"""The P2P Store: objects that one process registers and any number of others replicate, from it and from one another.

    store        P2PStore: register, get_replica, unregister, delete_replica, list
    holding      what a store holds and offers; replicating: how an object comes here
    pull         one reader's pull; source: what fetches from one source; swarm: which shard from whom
    manifest     what an object is; digests; layout: where its bytes are
    catalogue    keys and records in the metadata store, announcements; board: what peers read from one another instead
    files        real files and folders in and out; upstream: objects that the original's P2P Store published
    job          trainer, inferencer, and both as the ranks of an MPI job

A manifest is immutable: sizes, shard size, and a digest a shard. Each holder has one small leased record: where its
buffers are and which shards it holds. While it pulls, others read that, and what it is fetching from whom, from its
memory: its board. A shard is served as soon as it is verified.
"""

from mooncake_hpc.p2p.replication import Replica
from mooncake_hpc.p2p.store import P2PStore

__all__ = ["P2PStore", "Replica"]
