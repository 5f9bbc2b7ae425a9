"""The table of `docs/exports.md`: what a file of each exporter is worth in each runtime."""

import platform
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from tests.exports.cells import EXPORTERS, FORMS, Form
from tests.exports.sweep import Cell, Record

__all__ = ["in_page", "table"]

START, END = "<!-- exports -->", "<!-- /exports -->"
_COLUMNS = {
    (False, False): "one block, fixed sizes",
    (True, False): "several blocks, fixed",
    (False, True): "one block, open sizes",
    (True, True): "several blocks, open",
}
_LONGEST = 240


def table(records: Sequence[Record]) -> str:
    """Counts, a row for each exporter and runtime, what was not run, and what was said.

    Args:
        records: of every exporter that was run.
    """
    cells = [cell for record in records for cell in record.cells]
    counts = Counter(cell.ending for cell in cells)
    said = (
        f"{len(cells)} cells: {counts['right']} right, {counts['refused']} refused, {counts['wrong']} wrong."
    )
    dates = sorted({record.date for record in records})
    versions = sorted({f"{name} {number}" for record in records for name, number in record.versions.items()})
    notes: dict[str, int] = {}
    rows = [
        f"| {exporter.layer} | {exporter.words} | {runtime or '–'} | {' | '.join(_row(mine, notes))} |"
        for exporter in EXPORTERS
        for runtime in exporter.runtimes
        if (mine := [cell for cell in cells if (cell.exporter, cell.runtime) == (exporter.name, runtime)])
    ]
    run = {record.exporter for record in records}
    missing = [f"{each.layer} as {each.words}" for each in EXPORTERS if each.name not in run]
    return "\n".join(
        [
            f"{said} Python {platform.python_version()}, {platform.machine()}, {' and '.join(dates)}; {', '.join(versions)}.",
            "",
            *((f"Not run yet: {'; '.join(missing)}.", "") if missing else ()),
            f"| layer | exported as | run by | {' | '.join(_COLUMNS.values())} |",
            f"|{'---|' * (3 + len(_COLUMNS))}",
            *rows,
            "",
            *(("What the tools said, at the numbers in the table:", "") if notes else ()),
            *(f"{number}. {said}" for said, number in notes.items()),
        ]
    )


def _row(cells: Sequence[Cell], notes: dict[str, int]) -> Iterator[str]:
    forms = {form.words: form for form in FORMS}
    for blocks, open_ in _COLUMNS:
        column = [
            cell for cell in cells if (forms[cell.form].blocks, forms[cell.form].open) == (blocks, open_)
        ]
        right = [cell for cell in column if cell.ending == "right"]
        parts = [f"{max(cell.floors for cell in right):.2f}{_marks(right, notes)}"] if right else []
        for ending in ("refused", "wrong"):
            some = [cell for cell in column if cell.ending == ending]
            word = ending if ending == "refused" else "**wrong**"
            if some:
                whose = "" if len(some) == len(column) else f" {_whose([forms[cell.form] for cell in some])}"
                parts.append(f"{word}{whose}{_marks(some, notes)}")
        yield "; ".join(parts) or "–"


def _whose(forms: Sequence[Form]) -> str:
    """Which of flat and pooled, with the map and without."""
    have = {(form.config, form.with_map) for form in forms}
    for config in ("flat", "pooled"):
        if have == {(config, False), (config, True)}:
            return config
    for with_map, words in ((False, "without the map"), (True, "with the map")):
        if have == {("flat", with_map), ("pooled", with_map)}:
            return words
    return ", ".join(
        f"{config} {'with' if with_map else 'without'} the map" for config, with_map in sorted(have)
    )


def _marks(cells: Sequence[Cell], notes: dict[str, int]) -> str:
    numbers = sorted({notes.setdefault(_quoted(cell.said), len(notes) + 1) for cell in cells if cell.said})
    return f" ({', '.join(map(str, numbers))})" if numbers else ""


def _quoted(said: str) -> str:
    # Keras colours the words of some errors, also where nobody looks at a terminal.
    said = re.sub(r"\x1b\[[\d;]*m", "", said)
    # Addresses of objects are others in every run, and one refusal would have several numbers.
    said = re.sub(r"0x[0-9a-f]+", "0x…", said)
    words = said if len(said) <= _LONGEST else f"{said[:_LONGEST]}…"
    return f"`{words.replace('`', chr(39)).replace('|', '¦')}`"


def in_page(page: str, text: str) -> str:
    """The page with the table between its two marks.

    Args:
        page: the whole of it.
        text: the table.
    """
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"expected {START} and {END} in the page, to put the table between them.")
    return f"{before}{START}\n{text}\n{END}{after}"
