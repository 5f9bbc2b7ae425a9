"""The table of features names tests that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
# After that heading comes a table of another shape.
TABLES, _, EXPORTS = PAGE.partition("## What Keras exports")
ROWS = [line for line in TABLES.splitlines() if line[:1] == "|"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:40] or "head")
def test_every_row_has_a_cell_for_each_framework_and_names_tests_that_exist(row):
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == 5
    assert all(cells[1:])
    for name in re.findall(r"`([a-z_0-9/]+\.py)`", row):
        assert (ROOT / "tests" / name).is_file(), name


def test_the_table_names_tests():
    assert sum("test_" in row for row in ROWS) > 30


def test_the_table_of_exports_has_a_cell_for_each_backend():
    rows = [line.strip("|").split("|") for line in EXPORTS.splitlines() if line[:1] == "|"]
    assert len(rows) > 4
    assert all(len(row) == 4 and all(cell.strip() for cell in row[1:]) for row in rows)
