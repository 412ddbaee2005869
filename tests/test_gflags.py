"""gflags' forms, its errors, and the help."""

from __future__ import annotations

from pathlib import Path

import pytest

from mooncake_hpc.cli.gflags import Flag, FlagSet, Parsed
from mooncake_hpc.core.errors import ConfigError

FLAGS = FlagSet(
    "demo",
    "A demonstration.",
    {
        "Sizes": [
            Flag("block_size", 65536, "Bytes of a request.", unit="bytes"),
            Flag("duration", 10.0, "Time.", "s"),
        ],
        "Other": [
            Flag("operation", "read", "What to do.", choices=("read", "write")),
            Flag("verify", False, "Compare bytes."),
            Flag("fancy", True, "On by default."),
            Flag("name", "", "Any text."),
        ],
    },
    epilog="The end.",
)


def parse(*arguments: str, **env: str) -> Parsed:
    return FLAGS.parse(arguments, env)


@pytest.mark.parametrize(
    "arguments",
    [("--block_size=4096",), ("--block_size", "4096"), ("-block_size=4096",), ("-block_size", "4096"),
     ("--block-size=4096",), ("--block_size=0x1000",), ("--block_size=1", "--block_size=4096")],
)  # fmt: skip
def test_value_forms(arguments: tuple[str, ...]) -> None:
    parsed = parse(*arguments)
    assert parsed.integer("block_size") == 4096
    assert parsed.named == {"block_size"}


def test_defaults_and_types() -> None:
    parsed = parse("--duration=3")
    assert parsed.number("duration") == 3.0 and parsed.integer("block_size") == 65536
    assert parsed.text("operation") == "read" and parsed.named == {"duration"}


@pytest.mark.parametrize(
    ("argument", "expected"),
    [("--verify", True), ("-verify", True), ("--verify=true", True), ("--verify=T", True),
     ("--verify=1", True),
     ("--verify=yes", True), ("--noverify", False), ("--verify=false", False), ("--verify=0", False)],
)  # fmt: skip
def test_booleans(argument: str, expected: bool) -> None:
    assert parse(argument).boolean("verify") is expected


def test_a_boolean_does_not_take_the_next_argument() -> None:
    parsed = parse("--verify", "--name", "true")
    assert parsed.boolean("verify") and parsed.text("name") == "true"


def test_no_prefix_switches_off_only_booleans() -> None:
    assert parse("--nofancy").boolean("fancy") is False
    with pytest.raises(ConfigError, match="unknown flag --noname"):
        parse("--noname")
    with pytest.raises(ConfigError, match="takes no value"):
        parse("--nofancy=1")


def test_values_may_hold_equal_signs_dashes_and_be_empty() -> None:
    assert parse("--name=a=b-c").text("name") == "a=b-c"
    assert parse("--name=").text("name") == ""
    assert parse("--name", "-1").text("name") == "-1"


def test_unknown_flag_names_its_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"unknown flag --blok_size; did you mean --block_size"):
        parse("--blok_size=1")
    assert parse("--strange=1", "--undefok=strange").named == frozenset()


@pytest.mark.parametrize(
    ("argument", "message"),
    [("--block_size=many", "expected an integer"), ("--block_size=1.5", "expected an integer"),
     ("--duration=soon", "expected a number"), ("--verify=perhaps", "expected true or false"),
     ("--operation=swap", "expected one of read, write"), ("stray", "unexpected argument 'stray'"),
     ("--name", "needs a value")],
)  # fmt: skip
def test_bad_values(argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(argument)


def test_flagfile(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.write_text("--duration 7\n")
    outer = tmp_path / "outer"
    outer.write_text(f"# comment\n\n--block_size=12\n--flagfile={inner}\nother*\n--name=no\ndem*\n--name=yes\n")
    parsed = parse(f"--flagfile={outer}", "--block_size=13")
    assert parsed.integer("block_size") == 13 and parsed.number("duration") == 7
    assert parsed.text("name") == "yes"


def test_flagfile_errors(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.write_text(f"--flagfile={loop}\n")
    with pytest.raises(ConfigError, match="includes itself"):
        parse(f"--flagfile={loop}")
    with pytest.raises(ConfigError, match="cannot be read"):
        parse(f"--flagfile={tmp_path / 'absent'}")


def test_from_environment() -> None:
    assert parse("--fromenv=name", FLAGS_name="x").text("name") == "x"
    assert parse("--tryfromenv=name").text("name") == ""
    with pytest.raises(ConfigError, match="FLAGS_name is not set"):
        parse("--fromenv=name")


def test_help_shows_groups_units_defaults() -> None:
    assert parse("--help").wants_help and parse("--version").wants_version
    text = FLAGS.help()
    assert "Sizes:" in text and "--block_size  (int, bytes; default 65536)" in text
    assert "One of read, write." in text and text.endswith("The end.\n")
