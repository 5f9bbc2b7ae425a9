"""`help(SelfAttention2d)` can be read in a terminal of 80 columns."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# `help` sets four characters before each line.
COLUMNS = 80 - 4


def classes(folder: Path) -> dict[str, str]:
    """The docstrings of the layers, by file."""
    return {
        str(path.relative_to(folder)): ast.get_docstring(node) or ""
        for path in folder.rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name.lower() == "selfattention2d"
    }


DOCSTRINGS = classes(ROOT / "backends")


def test_there_are_four_layers():
    assert len(DOCSTRINGS) == 4


@pytest.mark.parametrize("file", DOCSTRINGS)
def test_the_docstring_of_a_layer(file):
    text = DOCSTRINGS[file]
    assert [line for line in text.splitlines() if len(line) > COLUMNS] == []
    for part in ("| x, y | (", "| A | (", "\nArgs:\n", "\nRaises:\n", "\nExample:\n"):
        assert part in text
