"""The program's standard streams: open even where the caller closed them, and never a reason to lose a result.

Inside `guarded` a character that the terminal's encoding lacks is replaced, and output that cannot be written (a closed
or broken pipe, a full disk) costs one line on standard error and exit code OUTPUT_LOST, while the program goes on.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import TextIO

OUTPUT_LOST = 3  # exit code of a run that succeeded, but whose standard output was lost
ERRORS = "mooncake_hpc.plain"  # name of our handler of characters that cannot be encoded
PLAIN = {
    "µ": "u", "×": "x", "·": ".", "█": "#", "…": "...", "–": "-", "—": "-", "→": "->", "≤": "<=", "≥": ">=",
    "✓": "ok", "±": "+-",
}  # fmt: skip


class _Output(io.RawIOBase):
    """A descriptor that takes all that is written, and keeps the first reason why it was lost."""

    def __init__(self, fd: int, lost: OSError | None) -> None:
        self._fd = fd
        self.lost = lost

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, data: bytes | bytearray | memoryview) -> int:  # type: ignore[override]
        while self.lost is None:
            try:
                return os.write(self._fd, data)
            except BlockingIOError:  # the caller's terminal or pipe does not block
                select.select((), (self._fd,), ())
            except OSError as error:
                self.lost = error
                if self._fd == 1:
                    _tell(error)
        return len(data)


def _tell(error: OSError) -> None:
    print(f"mooncake-hpc: what goes to standard output is lost: {error.strerror}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def guarded() -> Iterator[_Output | None]:
    """Guard sys.stdout and sys.stderr meanwhile, and have all three descriptors open, from now on.

    Gives the standard output; None where the caller has put streams of its own in place, which are left alone.
    """
    closed = _open_closed()
    if sys.stdout is not sys.__stdout__ or sys.stderr is not sys.__stderr__:
        yield None
        return
    codecs.register_error(ERRORS, _replace)
    before = sys.stdout, sys.stderr
    _, error_stream = _wrap(2, before[1], None)
    output, output_stream = _wrap(1, before[0], OSError(9, "it is closed") if 1 in closed else None)
    sys.stdout, sys.stderr = output_stream, error_stream
    if output.lost:
        _tell(output.lost)
    try:
        yield output
    finally:
        for stream in (output_stream, error_stream):
            stream.flush()
        sys.stdout, sys.stderr = before


def output_lost() -> bool:
    """Whether what this program has printed was lost."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return isinstance(raw, _Output) and raw.lost is not None


def input_closed() -> bool:
    """Whether the program was started without a standard input."""
    return sys.stdin is None


def _open_closed() -> set[int]:
    """Put /dev/null in the place of closed descriptors: else the next socket would get the number, and the output."""
    closed = set()
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            closed.add(fd)
            if (null := os.open(os.devnull, os.O_RDWR)) != fd:
                os.dup2(null, fd)
                os.close(null)
            os.set_inheritable(fd, True)
    return closed


def _wrap(fd: int, stream: TextIO | None, lost: OSError | None) -> tuple[_Output, io.TextIOWrapper]:
    """A stream as `stream` is, which sys has None for where the descriptor was closed."""
    raw = _Output(fd, lost)
    like = stream if isinstance(stream, io.TextIOWrapper) else None
    if like is not None:
        like.flush()
    return raw, io.TextIOWrapper(
        io.BufferedWriter(raw),  # type: ignore[type-var]
        encoding=like.encoding if like else "utf-8",
        errors=ERRORS,
        # an unbuffered stream writes each line at once, too: lines of both streams keep their order
        line_buffering=like.line_buffering or like.write_through if like else True,
    )


def _replace(error: UnicodeError) -> tuple[str, int]:
    """Signs that we use by a plain one, all else by its escape, as `backslashreplace`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text), error.end
