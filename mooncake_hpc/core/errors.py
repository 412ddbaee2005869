"""Every exception that mooncake_hpc raises on purpose.

MooncakeError
├── ConfigError (ValueError)          a flag, variable or argument that cannot be
│   └── DeviceError                   an RDMA device that cannot be used as it is
├── MetadataError
│   ├── MetadataUnavailable (ConnectionError)   the store does not answer
│   ├── MalformedRecord (ValueError)            what a peer or somebody in the store wrote cannot be read
│   ├── SegmentNotFound (LookupError)           nobody has this name
│   └── NameInUse                               a living process holds this name
├── RegistrationError (ValueError)    memory that cannot be registered, or is not
├── ForkError (RuntimeError)          an object that a forked child has inherited: it is its parent's
├── WorkerError                       a worker process failed and could not be replaced
├── LimitError                        a limit of the process or the machine is reached
├── LockHeld (TimeoutError)           another process holds a lock file
├── P2PError                          the P2P Store refused or failed
│   ├── ObjectNotFound (LookupError)            nobody holds such an object, or all of it
│   ├── ObjectExists                            somebody else's object has the name
│   ├── ObjectReplaced                          the name was registered again meanwhile
│   ├── SizeMismatch (ValueError)               buffers to receive it have other sizes
│   └── IntegrityError                          bytes do not match their digest, from any source
└── TransferError
    ├── AddressRejected (ValueError)  an address outside the peer's (or our own) registered buffers
    ├── PeerLost (ConnectionError)    the peer died, restarted or cannot be reached
    │   ├── AuthenticationError (PermissionError)   the peer or we have no secret, or another one
    │   └── PeerSilent                          it does not answer: stopped, busy or cut off, not known to be dead
    ├── TransferTimeout (TimeoutError)
    └── TransferCancelled
"""


class MooncakeError(Exception):
    """Base of all errors of this package."""


class ConfigError(MooncakeError, ValueError):
    """A flag, variable or argument has an impossible value; the text says which and what is accepted."""


class DeviceError(ConfigError):
    """An RDMA device, port or queue pair cannot be used; the text names it and says why. `code` is the errno or 0."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


class MetadataError(MooncakeError):
    """The metadata store refused or failed."""


class MetadataUnavailable(MetadataError, ConnectionError):
    """The metadata store does not answer within its deadline."""


class MalformedRecord(MetadataError, ValueError):
    """JSON from a peer or from the metadata store is not what it should be; the text names its source and the field."""


class SegmentNotFound(MetadataError, LookupError):
    """No segment of this name is published."""


class NameInUse(MetadataError):
    """A living process already publishes a segment of this name."""


class RegistrationError(MooncakeError, ValueError):
    """Memory that cannot be registered, or that is not registered."""


class P2PError(MooncakeError):
    """The P2P Store refused or failed; the text names the object."""


class ObjectNotFound(P2PError, LookupError):
    """Nobody holds an object of this name, or shards that nobody holds any more are missing."""


class ObjectExists(P2PError):
    """Somebody else has registered another object under this name."""


class ObjectReplaced(P2PError):
    """The name was registered again meanwhile, and the old version's holders have left."""


class SizeMismatch(P2PError, ValueError):
    """The buffers given to receive an object are not of its sizes."""


class IntegrityError(P2PError):
    """Bytes do not match the digest in the manifest, whatever source they come from."""


class ForkError(MooncakeError, RuntimeError):
    """An object that belongs to the process that this one was forked from: open a new one in the child."""


class WorkerError(MooncakeError):
    """A worker process failed and could not be replaced."""


class LimitError(MooncakeError):
    """A limit of this process or machine is reached (descriptors, threads, memory, disk); the text says which."""


class LockHeld(MooncakeError, TimeoutError):
    """Another process holds a lock file; the text names the file."""


class TransferError(MooncakeError):
    """A batch or a request failed; the text names peer, segment, address and cause of the first.

    `failed` is how many requests of the batch failed, where `TransferEngine.transfer` raised it.
    """

    failed = 1


class AddressRejected(TransferError, ValueError):
    """An address range that lies in no single registered buffer, or is read-only."""


class PeerLost(TransferError, ConnectionError):
    """The peer died, restarted or cannot be reached."""


class AuthenticationError(PeerLost, PermissionError):
    """The peer does not prove that it knows our secret, or wants a proof that we cannot give; the text says what to do.

    `reason` is an `authentication.Reason`, or "" where a batch failed of it.
    """

    def __init__(self, text: str, reason: str = "") -> None:
        super().__init__(text)
        self.reason = reason


class PeerSilent(PeerLost):
    """The peer does not answer in time: it is stopped, busy or cut off, and may come back. It may be dead, too."""


class TransferTimeout(TransferError, TimeoutError):
    """A deadline passed; a batch whose wait timed out is still running."""


class TransferCancelled(TransferError):
    """The batch was cancelled by its owner."""
