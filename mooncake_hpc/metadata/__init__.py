"""Where segments are published and found: `open_store` gives the store that a user names.

`base` is the interface; `etcd` and `memory` fulfil it; `embedded` starts an etcd. Nothing heavy is imported
before a store is opened.
"""

from mooncake_hpc.metadata.base import MetadataStore
from mooncake_hpc.metadata.store import open_store

__all__ = ["MetadataStore", "open_store"]
