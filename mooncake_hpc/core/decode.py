"""Read JSON that others wrote: frames of peers, and values in the metadata store.

Each kind of value has one `Reader`. It decodes a text into a record whose fields state their limits by the types
below. Whatever does not fit raises MalformedRecord, which names the source and the field. Fields that the record does
not know are ignored, and of a field that is there twice the last one counts: Mooncake's JSON library does the same.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Annotated, Generic, TypeVar

import msgspec
from msgspec import Meta

from mooncake_hpc.core import process
from mooncake_hpc.core.errors import MalformedRecord

T = TypeVar("T")

ADDRESS_END = 1 << 64  # no memory range reaches further
LONGEST_NAME = 512  # characters
LONGEST_VALUE = 128 << 20  # bytes: the largest frame that MC_HANDSHAKE_MAX_LENGTH can allow
LONGEST_SMALL_VALUE = 64 << 10  # bytes of values that hold no list which grows with memory or peers
REMEMBERED = 1024  # texts that `warn_once` remembers

Address = Annotated[int, Meta(ge=0)]  # `check_range` has the upper limit, which is beyond what Meta can say
Length = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]  # bytes; as `kernels.ranges.LONGEST`
Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Positive = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]
Port = Annotated[int, Meta(ge=1, le=65535)]
OptionalPort = Annotated[int, Meta(ge=0, le=65535)]  # 0: there is none
Key = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]  # of an RDMA memory region
Lid = Annotated[int, Meta(ge=0, le=0xFFFF)]
Text = Annotated[str, Meta(max_length=LONGEST_NAME)]
Name = Annotated[str, Meta(min_length=1, max_length=LONGEST_NAME)]

_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")  # raw ones are malformed JSON
_told: dict[str, None] = {}  # oldest first
_told_lock = process.lock()


class Reader(Generic[T]):
    """Decodes texts of one kind, of at most `longest` bytes, into `record`. `what` names the kind in errors."""

    def __init__(self, record: type[T], what: str, longest: int = LONGEST_VALUE, *, nul: bool = False) -> None:
        """With `nul`, texts may hold NUL characters."""
        self._decoder: msgspec.json.Decoder[T] = msgspec.json.Decoder(record)
        self._what, self._longest, self._nul = what, longest, nul

    def __call__(self, text: str | bytes, where: str) -> T:
        """The record in `text`. `where` names its source in the MalformedRecord of anything else."""
        try:
            if len(text) > self._longest:
                raise ValueError(f"{len(text)} bytes are above the limit of {self._longest}")
            if isinstance(text, bytes):
                text = text.decode()
            if "\\u0000" in text and not self._nul and _NUL.search(text):
                raise ValueError("a text holds a NUL character")
            return self._decoder.decode(text)
        except (ValueError, msgspec.MsgspecError, RecursionError) as error:  # UnicodeError is a ValueError
            raise _malformed(self._what, where, error) from error


@contextlib.contextmanager
def reading(what: str, where: str) -> Iterator[None]:
    """Turn what is wrong with a value of the kind `what`, found at `where`, into a MalformedRecord."""
    try:
        yield
    except ValueError as error:
        raise _malformed(what, where, error) from error


def _malformed(what: str, where: str, error: Exception) -> MalformedRecord:
    cause = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    return MalformedRecord(f"{where} holds no {what}: {cause}")


def check_range(address: int, nbytes: int) -> None:
    """Raise ValueError unless these bytes have addresses of 64 bits, without a sign."""
    if not 0 <= address <= address + nbytes <= ADDRESS_END:
        raise ValueError(f"{nbytes} bytes at address {address} are not within 64 bits")


def warn_once(log: logging.Logger, error: Exception) -> None:
    """Log that a value of others is left out. The same text is not logged again for a long time."""
    text = str(error)
    with _told_lock:
        if text in _told:
            return
        _told[text] = None
        if len(_told) > REMEMBERED:
            del _told[next(iter(_told))]
    log.warning("left out: %s", text)
