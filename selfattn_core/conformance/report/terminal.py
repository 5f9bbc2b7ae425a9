"""The report for a terminal. It uses the colours of click, which is always installed, and no library for tables."""

from collections.abc import Sequence

import click

from selfattn_core.conformance.report.summary import (
    Cell,
    Data,
    device_words,
    family_cell,
    family_title,
    has_cases,
    multiple,
    precisions_by_factor,
    problems,
    search_words,
    tested_levels,
    worst,
)

__all__ = ["as_table", "show"]

_MOST_PROBLEMS = 10
_COLOURS = {
    "good": "green",
    "bad": "red",
    "expected": "yellow",
    "unclaimed": "bright_black",
    "absent": "yellow",
}


def show(data: Data, *, error_stream: bool = False) -> None:
    """Print the report, with colours if the output is a terminal.

    Args:
        data: the report.
        error_stream: whether to print to standard error, because another report uses standard output.
    """
    # click removes the colours if the output is not a terminal.
    click.echo(as_table(data, colours=True), err=error_stream)


def as_table(data: Data, *, colours: bool = False) -> str:
    """A table of the worst errors in noise floors, with a row for each family and a column for each backend.

    Args:
        data: the report.
        colours: whether to add the colour codes of terminals.
    """
    lines = []
    if has_cases(data):
        reached = [
            Cell("good" if backend["level"] else "bad", backend["level"] or "no level")
            for backend in data["backends"]
        ]
        rows = [*_rows(data), ("conformant at", reached)]
        names = [backend["name"] for backend in data["backends"]]
        widths = [
            max(len(name), *(len(cells[column].text) for _, cells in rows))
            for column, name in enumerate(names)
        ]
        first = max(len(title) for title, _ in rows)
        header = [name.ljust(width) for name, width in zip(names, widths, strict=True)]
        lines = [
            "  ".join([" " * first, *header]).rstrip(),
            "  ".join("-" * width for width in (first, *widths)),
        ]
        for title, cells in rows:
            texts = [cell.text.ljust(width) for cell, width in zip(cells, widths, strict=True)]
            texts[-1] = texts[-1].rstrip()
            if colours:
                texts = [
                    click.style(text, fg=_COLOURS[cell.kind]) for text, cell in zip(texts, cells, strict=True)
                ]
            lines.append("  ".join([title.ljust(first), *texts]))
    return "\n".join([*lines, *_below(data)])


def _rows(data: Data) -> list[tuple[str, list[Cell]]]:
    rows = []
    for families in tested_levels(data).values():
        for family in families:
            cells = [family_cell(data, backend, family) for backend in data["backends"]]
            if any(cell.text != "–" for cell in cells):
                rows.append((family_title(family), cells))
    return rows


def _below(data: Data) -> list[str]:
    lines = []
    if any(backend["outcomes"] for backend in data["backends"]):
        passing = "; ".join(
            f"up to {factor:g} × passes in {precisions}"
            for factor, precisions in precisions_by_factor(data).items()
        )
        lines += ["", f"Numbers are errors as multiples of the noise floor; {passing}."]
        if worst_ones := worst(data, 1):
            backend, outcome, _ = worst_ones[0]
            lines.append(
                f"Worst: {multiple(max(outcome['ratios'].values()))} by {backend['name']} in {outcome['case']} "
                f"({outcome['title']}; {outcome['dtype']}, {outcome['layout']})."
            )
    if data["backends"]:
        searched = [
            f"  {backend['name']}: {words}."
            for backend in data["backends"]
            if (words := search_words(backend))
        ]
        lines += ["Search:", *searched] if searched else []
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
    lines = ["Mutants, and the case that caught each with the largest multiple:"]
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
