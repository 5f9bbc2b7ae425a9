"""The report for a terminal: coloured where rich is installed, plain text otherwise."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from selfattn_core.conformance.report.summary import (
    Cell,
    Data,
    device_words,
    family_cell,
    family_title,
    multiple,
    problems,
    tested_levels,
    worst,
)

__all__ = ["as_table", "show"]

_MOST_PROBLEMS = 10
_STYLES = {"good": "green", "bad": "bold red", "expected": "yellow", "unclaimed": "dim", "absent": "yellow"}


def show(data: Data, *, error_stream: bool = False) -> None:
    """Print the report.

    Args:
        data: the report.
        error_stream: whether to standard error, standard output being taken by something else.
    """
    if find_spec("rich") is None:
        import click

        click.echo(as_table(data), err=error_stream)
        return
    from rich.console import Console

    # The names and messages of backends are no markup, and ":X" in a name is no emoji.
    console = Console(stderr=error_stream, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        # A pipe has no width that lines should be broken at.
        console.print(as_table(data), soft_wrap=True)
        return
    if data["backends"]:
        console.print(_rich_table(data))
    for line in _below(data):
        console.print(line)


def as_table(data: Data) -> str:
    """Case family × backend: the worst error in noise floors.

    Args:
        data: the report.
    """
    lines = []
    if data["backends"]:
        rows = [["", *(backend["name"] for backend in data["backends"])]]
        rows += [[title, *(cell.text for cell in cells)] for _, title, cells in _rows(data)]
        rows.append(["conformant at", *(backend["level"] or "no level" for backend in data["backends"])])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, *_below(data)])


def _rows(data: Data) -> list[tuple[str, str, list[Cell]]]:
    rows = []
    for level, families in tested_levels(data).items():
        for family in families:
            cells = [family_cell(data, backend, family) for backend in data["backends"]]
            if any(cell.text != "–" for cell in cells):
                rows.append((level, family_title(family), cells))
    return rows


def _rich_table(data: Data) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold")
    table.add_column("")
    for backend in data["backends"]:
        table.add_column(backend["name"])
    level = ""
    for name, title, cells in _rows(data):
        if level and name != level:
            table.add_section()
        level = name
        table.add_row(title, *(Text(cell.text, style=_STYLES[cell.kind]) for cell in cells))
    table.add_section()
    table.add_row(
        "conformant at",
        *(
            Text(backend["level"] or "no level", style="bold green" if backend["level"] else "bold red")
            for backend in data["backends"]
        ),
    )
    return table


def _below(data: Data) -> list[str]:
    lines = []
    if data["backends"]:
        limits: dict[float, list[str]] = {}
        for dtype, factor in data["factors"].items():
            limits.setdefault(factor, []).append(dtype)
        passing = "; ".join(
            f"up to {factor:g} × passes in {' and '.join(dtypes)}" for factor, dtypes in limits.items()
        )
        lines += ["", f"Numbers are errors as multiples of the noise floor; {passing}."]
        if worst_ones := worst(data, 1):
            backend, outcome, _ = worst_ones[0]
            lines.append(
                f"Worst: {multiple(max(outcome['ratios'].values()))} by {backend['name']} in {outcome['case']} "
                f"({outcome['title']}; {outcome['dtype']}, {outcome['layout']})."
            )
        lines.append("Versions:")
        lines += [f"  {backend['name']}: {_versions(backend['versions'])}" for backend in data["backends"]]
        lines.append(f"  spec: {_versions(data['versions'])}")
        placed = [
            f"  {backend['name']}: {words}"
            for backend in data["backends"]
            if (words := device_words(backend))
        ]
        lines += ["Devices:", *placed] if placed else []
    for backend in data["backends"]:
        wrong = problems(data, backend)
        lines += [""] if wrong else []
        for problem in wrong[:_MOST_PROBLEMS]:
            lines.append(f"{backend['name']}: {problem.words}")
            lines += [f"  {problem.command}"] if problem.command else []
        if len(wrong) > _MOST_PROBLEMS:
            lines.append(
                f"{backend['name']}: and {len(wrong) - _MOST_PROBLEMS} more; --json FILE lists them all"
            )
    if data["kills"]:
        lines += ["", *_kill_table(data["kills"])]
    return lines


def _kill_table(kills: Sequence[Data]) -> list[str]:
    width = max(len(kill["mutant"]) for kill in kills)
    lines = ["Mutants, and the case that saw each best:"]
    for kill in kills:
        if kill["killed"]:
            how = multiple(kill["ratio"]) if kill["ratio"] is not None else _first_line(kill["message"])
            lines.append(f"  {kill['mutant']:<{width}}  {kill['case']} ({kill['dtype']}): {how}")
        else:
            lines.append(f"  {kill['mutant']:<{width}}  SURVIVED")
    alive = sum(not kill["killed"] for kill in kills)
    lines.append(f"{len(kills) - alive} of {len(kills)} mutants caught.")
    return lines


def _first_line(words: str) -> str:
    line = words.strip().splitlines()[-1] if words.strip() else ""
    return line if len(line) <= 80 else f"{line[:79]}…"


def _versions(versions: Data) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "-"
