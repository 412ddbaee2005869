"""What may be the name of a segment, an object or a host: a text that etcd, DNS and other programs can be told."""

from __future__ import annotations

from mooncake_hpc.core.errors import ConfigError

LONGEST_NAME = 512  # bytes in UTF-8


def check_name(name: object, what: str) -> None:
    """Raise ConfigError unless `name` is a text of 1 to LONGEST_NAME bytes without NUL. `what` is in the error."""
    if not isinstance(name, str):
        raise ConfigError(f"{what} is a text, not {name!r}")
    if not name:
        raise ConfigError(f"{what} is empty")
    check_text(name, what)


def check_text(text: str, what: str, longest: int = LONGEST_NAME) -> None:
    """As `check_name`, of a text that may be empty, such as the beginning of a name."""
    length = check_unicode(text, what)
    if length > longest:
        raise ConfigError(f"{what} {_shown(text)} has {length} bytes: 1 to {longest} are possible")
    if "\0" in text:
        raise ConfigError(f"{what} {_shown(text)} holds a NUL character")


def check_unicode(text: str, what: str) -> int:
    """The bytes of `text` in UTF-8. Raises ConfigError for one that holds surrogates."""
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise ConfigError(f"{what} {_shown(text)} holds a lone surrogate, as bytes that are not UTF-8 do") from error


def _shown(text: str) -> str:
    return repr(text[:40]) + ("…" if len(text) > 40 else "")
