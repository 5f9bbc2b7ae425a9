"""The pages of the site: every code block runs as a reader would run it, commands and targets exist, the site builds.

Blocks are run each with names of its own, those of one framework in one process.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from selfattn_core.cli import main
from selfattn_core.conformance.cases.families import FAMILIES, LEVELS, through
from selfattn_core.conformance.cases.table import CASES
from selfattn_core.conformance.protocol import METHODS
from tests.documents import blocks_of, failures

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for folder in ("docs", "examples") for path in (ROOT / folder).rglob("*.md"))

# The title of a block that needs more than the project's own packages: `make test-exports` runs it.
ELSEWHERE = 'title="pip install'
IMPORTS = {"torch": "torch", "keras": "keras", "flax": "flax", "jax": "flax", "tensorflow": "keras"}


def fenced(language: str, *, elsewhere: bool = False) -> list[tuple[str, str]]:
    """Place and text of every block in a language, which is run here or elsewhere."""
    return [
        (f"{page.relative_to(ROOT)}:{block.line}", block.code)
        for page in PAGES
        for block in blocks_of(page)
        if block.language == language and (ELSEWHERE in block.title) == elsewhere
    ]


def framework(code: str) -> str:
    """Which process a block is run in."""
    imported = re.findall(r"^\s*(?:import|from) (?:selfattn_)?(\w+)", code, re.M)
    return " ".join(sorted({IMPORTS[name] for name in imported if name in IMPORTS}))


BLOCKS = fenced("python")
GROUPS = {
    name: [block for block in BLOCKS if framework(block[1]) == name]
    for name in map(framework, dict(BLOCKS).values())
}


@pytest.mark.parametrize("group", GROUPS)
def test_the_blocks_run(group):
    # On the other backends of Keras the README's block is run.
    assert not failures(GROUPS[group], KERAS_BACKEND="tensorflow")


def test_every_framework_has_blocks():
    assert {"torch", "keras", "flax", ""} <= set(GROUPS)


def test_a_block_that_does_not_run_is_noticed():
    assert list(failures([("a:1", "x = 1"), ("b:2", "assert x"), ("c:3", "import sys; sys.exit(0)")])) == [
        "b:2",
        "c:3",
    ]


@pytest.mark.parametrize("which", [0, 1], ids=["smallest", "complete"])
def test_the_backends_of_the_page_for_authors_are_conformant(tmp_path, which):
    code = [code for place, code in BLOCKS if "conformance-backends" in place][which]
    (tmp_path / "page_backend.py").write_text(code, encoding="utf-8")
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "from selfattn_core.cli import main; main(['conform', 'page_backend:Backend'])",
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "unclaimed" in result.stdout + result.stderr


def test_the_page_for_authors_lists_every_claim_with_its_method():
    text = (ROOT / "docs" / "conformance-backends.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)\(", text, re.M)
    assert rows == list(METHODS.items())
    for optional in ("declines", "update", "dtypes", "expected_failures"):
        assert f"`{optional}(" in text


def test_the_table_of_levels_names_the_claims_that_each_needs():
    text = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", text, re.M)
    named: set[str] = set()
    for (name, cell), level in zip(rows, LEVELS, strict=True):
        named |= set(re.findall(r"`(\w+)`", cell))
        families = {family for family in through(level) if not FAMILIES[family].optional}
        needed = set().union(*(case.needs for case in CASES if case.family in families))
        assert (name, named) == (level, needed)


@pytest.mark.parametrize(
    ("place", "text"), fenced("sh"), ids=lambda value: value[:40].strip() if "docs" in value else ""
)
def test_commands_and_their_options_exist(place, text):
    for line in text.replace("\\\n", " ").splitlines():
        words = line.partition("#")[0].split()
        if words[:1] == ["selfattn"] and len(words) > 1:
            command = main.get_command(click.Context(main), words[1])
            assert command is not None, f"{place}: there is no selfattn {words[1]}"
            options = {option for parameter in command.params for option in parameter.opts}
            used = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert used <= options, f"{place}: selfattn {words[1]} has no {used - options}"
        if words[:1] == ["make"]:
            assert words[1] in targets(), f"{place}: there is no make {words[1]}"
        if words[:2] == ["python", "-m"]:
            path = ROOT / words[2].replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), (
                f"{place}: no {words[2]}"
            )


def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):", makefile, re.M))


def test_targets_that_pages_name_exist():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert {"bench"} <= set(re.findall(r"`make ([a-z-]+)`", text)) <= targets()


def test_every_page_is_in_the_navigation_and_the_site_builds_without_a_warning(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        # Without this, Material prints a notice about its own future.
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    reference = (tmp_path / "reference" / "torch.html").read_text(encoding="utf-8")
    assert 'id="selfattn_torch.SelfAttention2d"' in reference
    assert "selfattn attend" in (tmp_path / "reference" / "command.html").read_text(encoding="utf-8")
