"""Command-line flags in gflags' forms, so that the original's command lines work as they stand.

`--x=1`, `--x 1`, `-x=1`, `--flag`, `--noflag`, `--flag=false`, dashes for underscores, `--` as the end of
flags, `--flagfile=a,b`, `--fromenv=x` and `--tryfromenv=x` (from the variable `FLAGS_x`), `--undefok=x`; the
last mention of a flag wins. Described at https://gflags.github.io/gflags/.
"""

from __future__ import annotations

import difflib
import fnmatch
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mooncake_hpc import __version__
from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.core.names import check_unicode

Value = bool | int | float | str
TRUE, FALSE = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")
HELP = ("help", "helpfull", "helpshort", "h")


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag; its type is the type of its default. `unit` and `choices` are for the help and the check."""

    name: str
    default: Value
    help: str
    unit: str = ""
    choices: tuple[str, ...] = ()

    def parse(self, text: str) -> Value:
        """The value of `text`; ConfigError says what is accepted."""
        check_unicode(text, f"--{self.name}")
        try:
            value = _CONVERTERS[type(self.default)](text)
        except ValueError:
            kind = {bool: "true or false", int: "an integer", float: "a number"}[type(self.default)]
            raise ConfigError(f"--{self.name}={text}: expected {kind}") from None
        if self.choices and value not in self.choices:
            raise ConfigError(f"--{self.name}={text}: expected one of {', '.join(filter(None, self.choices))}")
        return value


@dataclass(frozen=True, slots=True)
class Parsed:
    """Values of all flags, and which of them the user named."""

    values: dict[str, Value]
    named: frozenset[str]
    wants_help: bool = False
    wants_version: bool = False

    @property
    def asks(self) -> bool:
        """Whether all that is wanted is help, or the version: see `FlagSet.answer`."""
        return self.wants_help or self.wants_version

    def text(self, name: str) -> str:
        return str(self.values[name])

    def integer(self, name: str) -> int:
        return int(self.values[name])

    def number(self, name: str) -> float:
        return float(self.values[name])

    def boolean(self, name: str) -> bool:
        return bool(self.values[name])


@dataclass(frozen=True, slots=True)
class FlagSet:
    """The flags of a program, in groups that the help shows as sections."""

    program: str
    about: str
    groups: Mapping[str, Sequence[Flag]]
    epilog: str = ""
    stray: str = "every option has the form --name=value"  # what to say of an argument that is no flag

    def flags(self) -> dict[str, Flag]:
        return {flag.name: flag for group in self.groups.values() for flag in group}

    def parse(self, arguments: Sequence[str], env: Mapping[str, str]) -> Parsed:
        """Parse a command line without the program's name; `env` serves `--fromenv` alone.

        Raises ConfigError for an unknown flag (with its nearest names), a bad value, a stray argument.
        """
        state = _State(self.flags(), env, self.program, self.stray)
        state.take(list(arguments))
        state.check_unknown()
        values = {name: state.values.get(name, flag.default) for name, flag in state.flags.items()}
        return Parsed(values, frozenset(state.values), state.wants_help, state.wants_version)

    def answer(self, flags: Parsed) -> bool:
        """Print the help, or the version, where it is asked for; whether it was."""
        if flags.asks:
            print(self.help() if flags.wants_help else f"mooncake-hpc {__version__}\n", end="")
        return flags.asks

    def help(self) -> str:
        """Usage, flags by group with units and defaults, epilog."""
        lines = [f"usage: {self.program} [--flag=value …]", "", *textwrap.wrap(self.about, 100)]
        for title, flags in self.groups.items():
            lines += ["", f"{title}:", *(line for flag in flags for line in _describe(flag))]
        return "\n".join([*lines, "", self.epilog]).rstrip() + "\n"


@dataclass(slots=True)
class _State:
    flags: dict[str, Flag]
    env: Mapping[str, str]
    program: str
    stray: str
    values: dict[str, Value] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    accepted_unknown: set[str] = field(default_factory=set)
    files: list[str] = field(default_factory=list)
    wants_help: bool = False
    wants_version: bool = False

    def take(self, arguments: list[str]) -> None:
        """Consume arguments from the left."""
        while arguments:
            argument = arguments.pop(0)
            if argument == "--" and not arguments:
                return
            if not argument.startswith("-") or argument in ("-", "--"):
                raise ConfigError(f"unexpected argument {argument!r}: {self.stray}")
            name, equals, value = argument.lstrip("-").partition("=")
            self.assign(name.replace("-", "_"), value if equals else None, arguments)

    def assign(self, name: str, value: str | None, rest: list[str]) -> None:
        """Set a flag from its `=value`, or from the next argument where it has none."""
        if name in HELP:
            self.wants_help = True
        elif name == "version":
            self.wants_version = True
        elif name in ("flagfile", "fromenv", "tryfromenv", "undefok"):
            self.special(name, self.operand(name, value, rest))
        elif flag := self.flags.get(name):
            if isinstance(flag.default, bool):
                self.values[name] = flag.parse(value) if value is not None else True
            else:
                self.values[name] = flag.parse(self.operand(name, value, rest))
        elif negated := self.negated(name):
            if value is not None:
                raise ConfigError(f"--{name} takes no value; write --{negated}=false or --{name}")
            self.values[negated] = False
        else:
            self.unknown.append(name)

    def negated(self, name: str) -> str:
        """The boolean flag that `--no…` switches off, or ""."""
        flag = self.flags.get(name[2:]) if name.startswith("no") else None
        return flag.name if flag and isinstance(flag.default, bool) else ""

    def operand(self, name: str, value: str | None, rest: list[str]) -> str:
        if value is not None:
            return value
        if not rest:
            raise ConfigError(f"--{name} needs a value: --{name}=…")
        return rest.pop(0)

    def special(self, name: str, value: str) -> None:
        names = [part.strip() for part in value.split(",") if part.strip()]
        if name == "undefok":
            self.accepted_unknown.update(part.replace("-", "_") for part in names)
        elif name == "flagfile":
            for part in names:
                self.read_file(part)
        else:
            for part in names:
                if (text := self.env.get(f"FLAGS_{part}")) is not None:
                    self.assign(part, text, [])
                elif name == "fromenv":
                    raise ConfigError(f"--fromenv={part}: the variable FLAGS_{part} is not set")

    def read_file(self, name: str) -> None:
        """A flag a line; `#` starts a comment; other lines name the programs that the next flags are for."""
        if name in self.files:
            raise ConfigError(f"--flagfile={name} includes itself")
        try:
            lines = Path(name).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--flagfile={name} cannot be read: {error}") from error
        self.files.append(name)
        meant, patterns_end = True, True
        for line in (line.strip() for line in lines):
            if not line or line.startswith("#"):
                continue
            if line.startswith("-"):
                patterns_end = True
                if meant:
                    self.take([line] if "=" in line else line.split(None, 1))
            else:
                matches = any(fnmatch.fnmatch(self.program, pattern) for pattern in line.split())
                meant, patterns_end = matches or (meant and not patterns_end), False
        self.files.remove(name)

    def check_unknown(self) -> None:
        for name in self.unknown:
            if name in self.accepted_unknown or name.removeprefix("no") in self.accepted_unknown:
                continue
            near = difflib.get_close_matches(name, self.flags, n=3, cutoff=0.6)
            hint = f"; did you mean {' or '.join('--' + n for n in near)}?" if near else "; see --help"
            raise ConfigError(f"unknown flag --{name}{hint}")


def _boolean(text: str) -> bool:
    if text.lower() in TRUE:
        return True
    if text.lower() in FALSE:
        return False
    raise ValueError(text)


def _integer(text: str) -> int:
    return int(text, 16 if text.lower().lstrip("+-").startswith("0x") else 10)


_CONVERTERS: dict[type, Callable[[str], Value]] = {bool: _boolean, int: _integer, float: float, str: str}


def _describe(flag: Flag) -> Iterable[str]:
    kind = type(flag.default).__name__
    unit = f", {flag.unit}" if flag.unit else ""
    default = f'"{flag.default}"' if isinstance(flag.default, str) else str(flag.default).lower()
    choices = f" One of {', '.join(filter(None, flag.choices))}." if flag.choices else ""
    yield f"  --{flag.name}  ({kind}{unit}; default {default})"
    yield from textwrap.wrap(flag.help + choices, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
