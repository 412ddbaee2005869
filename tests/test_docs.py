"""The reference pages have everything that the code has; the site itself is built by launch/docs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from types import ModuleType

import pytest
from conftest import ROOT, clean_env

import mooncake_hpc


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


generate = load()


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    made: dict[str, str] = generate.pages()
    return made


def test_every_public_name_is_on_the_api_page(pages: dict[str, str]) -> None:
    named = re.findall(r"^(?:::: mooncake_hpc\.|## )(\w+)$", pages["reference/api.md"], re.MULTILINE)
    assert set(mooncake_hpc.__all__) - {"errors"} <= set(named)


def test_every_flag_of_every_command_is_on_its_page(pages: dict[str, str]) -> None:
    sections = re.split(r"^## mooncake-hpc ", pages["reference/cli.md"], flags=re.MULTILINE)[1:]
    text = {section.split("\n")[0]: section for section in sections}
    sets = generate.flag_sets()
    assert set(text) == set(sets) and len(sets) >= 6
    for command, flags in sets.items():
        missing = [name for name in flags.flags() if f"| `--{name}` |" not in text[command]]
        assert not missing, command


def test_every_variable_is_in_the_table_with_its_default_and_field(pages: dict[str, str]) -> None:
    rows = dict(re.findall(r"^\| `(\w+)`.*?\| (.*) \|$", pages["reference/environment.md"], re.MULTILINE))
    known, defaults = generate.variables(), generate.defaults()
    fields = set(known.values())
    assert len(known) > 40
    for name, field in known.items():
        if name in rows:
            accepts, default, meaning, shown_field = (cell.strip() for cell in rows[name].split("|"))
            assert (default, shown_field) == (generate.shown(defaults[field]), f"`{field}`") and accepts and meaning
        else:
            assert f"`{name}`" in pages["reference/environment.md"], name
    assert fields == set(defaults)  # no field that no variable sets


def test_defaults_by_hand_are_those_of_the_code() -> None:
    text = (ROOT / "docs/variables.md").read_text()
    known, defaults = generate.variables(), generate.defaults()
    by_hand = dict(re.findall(r"^\| `(\w+)`[^|]*\| ([^|]*?) *\|", text, re.MULTILINE))
    wrong = {name: told for name, told in by_hand.items() if name in known}
    assert wrong == {name: generate.shown(defaults[known[name]]) for name in wrong} and len(wrong) > 40


def test_every_error_has_a_meaning_a_cause_and_a_fix(pages: dict[str, str]) -> None:
    classes = generate.error_classes()
    assert set(generate.CAUSES) == set(classes) and len(classes) > 20
    for name, kind in classes.items():
        section = pages["reference/errors.md"].split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert kind.__doc__ and "**Cause.** " in section and "**Fix.** " in section


def test_every_key_of_a_json_result_is_explained() -> None:
    for title, (_, sample, known) in generate.samples().items():
        found = [key for key, _ in generate.keys(sample)]
        assert not [key for key in found if not explained(key, known, found)], title
        used = {generate.explained(key, known) for key in found}
        assert not {name for name in known if name not in used}, title


def explained(key: str, known: dict[str, str], found: list[str]) -> bool:
    """Whether the table has the key, or it is an object whose keys the table has."""
    return bool(generate.explained(key, known)) or f"{key}.*" in known


def test_links_to_files_that_are_no_pages_become_words() -> None:
    text = "[run](../benchmarks/README.md#how) [code](../launch/docs) [gone](../no/such.md) [web](https://example.org)"
    shown = generate.relinked(text, "docs/benchmarks.md", "benchmarks.md")
    assert shown == "[run](benchmarks/running.md#how) code [gone](../no/such.md) [web](https://example.org)"


def examples() -> list[tuple[str, str]]:
    """Programs of the pages, but those for which torch would have to be installed."""
    found = []
    for file in sorted((ROOT / "docs").rglob("*.md")):
        blocks = re.findall(r"```python\n(.*?)```", file.read_text(), re.DOTALL)
        found += [(f"{file.stem}-{number}", text) for number, text in enumerate(blocks) if "import torch" not in text]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, _ in examples()])
def test_programs_of_the_pages_run(name: str) -> None:
    command = [sys.executable, "-c", dict(examples())[name]]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=clean_env(), check=False)
    assert result.returncode == 0, result
    assert "True" in result.stdout and "False" not in result.stdout, result
