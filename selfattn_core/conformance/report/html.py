"""The report as one HTML page without scripts and without a network, for light and dark mode, desktop and phone."""

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from selfattn_core.conformance.report.summary import (
    Cell,
    Data,
    Problem,
    allowed,
    counts,
    device_words,
    family_cell,
    family_title,
    has_cases,
    level_cell,
    multiple,
    precisions_by_factor,
    problems,
    search_words,
    tested_levels,
    verdict,
    worst,
)
from selfattn_core.conformance.report.svg import Chart, Line, as_svg

__all__ = ["as_html"]

_COLOURS = 6
_FEW_PROBLEMS = 5


def as_html(data: Data) -> str:
    """The page with verdict, scorecard, errors by family, problems, worst cases, trajectories and mutants.

    Args:
        data: the report.
    """
    data = _escaped(data)
    style = files("selfattn_core.conformance.report").joinpath("page.css").read_text(encoding="utf-8")
    sections = [_head(data)]
    asked = has_cases(data)
    if data["backends"]:
        sections += [_scorecard(data) if asked else "", _search(data), _problems(data)]
    if asked:
        sections += [_families(data), _worst(data)]
    if data["trajectories"]:
        sections.append(_trajectories(data))
    if data["kills"]:
        sections.append(_kills(data))
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>selfattn conformance</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _escaped(value: Any) -> Any:
    """The report with every string escaped for HTML, so that the rest of this file can insert any of them."""
    if isinstance(value, Mapping):
        return {escape(name): _escaped(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(each) for each in value]
    return escape(value) if isinstance(value, str) else value


def _head(data: Data) -> str:
    good, words = verdict(data)
    facts = [
        f"level {data['level']}",
        *([f"device {data['device']}"] if data.get("device") else []),
        f"seed {data['seed']}",
        f"spec version {data['spec']}",
        f"selfattn {data['selfattn']}",
        *(f"{name} {version}" for name, version in data["versions"].items()),
        data["created"].replace("T", " ").replace("+00:00", " UTC"),
    ]
    return (
        '<p class="kicker">selfattn conformance</p>\n'
        f'<h1><span class="{"good" if good else "bad"}">{"✓" if good else "✗"}</span> {_headline(data)}</h1>\n'
        f"<p>{words}</p>\n"
        f'<p class="soft">{" · ".join(facts)}</p>'
    )


def _headline(data: Data) -> str:
    backends = data["backends"]
    passed = sum(backend["passed"] for backend in backends)
    parts = []
    if backends:
        number = len(backends)
        whole = {1: "The backend passes", 2: "Both backends pass"}.get(number, f"All {number} backends pass")
        some = f"{passed} of {number} backends pass" if number > 1 else "The backend does not pass"
        parts.append(whole if passed == number else some)
    if data["kills"]:
        killed = sum(kill["killed"] for kill in data["kills"])
        parts.append(f"{killed} of {len(data['kills'])} mutants caught")
    return ", ".join(parts) or "Nothing was run"


def _scorecard(data: Data) -> str:
    cards = "\n".join(_card(data, backend) for backend in data["backends"])
    return (
        "<h2>Scorecard</h2>\n"
        "<p>Each number is the largest error of a level, as a multiple of the noise floor: the error that the numpy "
        f"definition itself makes in the same arithmetic on the same input. {_limits(data)}. "
        f'The bars show the share of that.</p>\n<div class="cards">\n{cards}\n</div>'
    )


def _card(data: Data, backend: Data) -> str:
    if backend["missing"]:
        badge = '<span class="badge absent">not installed</span>'
    elif backend.get("absent"):
        badge = '<span class="badge absent">no such device</span>'
    elif backend["error"]:
        badge = '<span class="badge bad">did not start</span>'
    elif not backend["passed"]:
        badge = '<span class="badge bad">failed</span>'
        if backend["level"]:
            badge = f'<span class="badge bad">failed beyond {backend["level"]}</span>'
    elif backend["level"]:
        badge = f'<span class="badge good">conformant at {backend["level"]}</span>'
    else:
        badge = '<span class="badge unclaimed">passed all claims, no level</span>'
    rows = []
    for level in tested_levels(data):
        cell = level_cell(data, backend, level)
        rows.append(
            f'<div class="level"><span>{level}</span>{_bar(cell.share)}'
            f'<span class="{cell.kind}">{cell.text}</span></div>'
        )
    found = counts(backend["outcomes"])
    tally = ", ".join(f"{number} {status}" for status, number in found.items())
    versions = ", ".join(f"{name} {version}" for name, version in backend["versions"].items())
    foot = " · ".join(
        part
        for part in (device_words(backend), versions, tally, f"{backend['seconds']:.0f} s" if tally else "")
        if part
    )
    return (
        f'<section class="card"><header><h3>{backend["name"]}</h3>{badge}</header>\n'
        f'{"".join(rows)}<p class="soft">{foot}</p></section>'
    )


def _search(data: Data) -> str:
    rows = [
        f"<li>{backend['name']}: {words}.</li>"
        for backend in data["backends"]
        if (words := search_words(backend))
    ]
    return f"<h2>Search</h2>\n<ul>{''.join(rows)}</ul>" if rows else ""


def _problems(data: Data) -> str:
    parts = []
    for backend in data["backends"]:
        if wrong := problems(data, backend):
            parts.append(f"<h3>{backend['name']}</h3>{_items(wrong[:_FEW_PROBLEMS])}")
            if more := wrong[_FEW_PROBLEMS:]:
                parts.append(f"<details><summary>and {len(more)} more</summary>{_items(more)}</details>")
    expected = [
        Problem(
            f"{backend['name']}: {outcome['case']}, {outcome['dtype']}: {outcome['reason']} ({outcome['link']})"
        )
        for backend in data["backends"]
        for outcome in backend["outcomes"]
        if outcome["status"] == "expected-failure"
    ]
    if expected:
        parts.append(f"<h3>Expected failures</h3>{_items(expected)}")
    return "\n".join(["<h2>Problems</h2>", *parts]) if parts else ""


def _items(lines: Sequence[Problem]) -> str:
    items = (
        f"<li>{line.words}{f'<br><code>{line.command}</code>' if line.command else ''}</li>" for line in lines
    )
    return f'<ul class="problems">{"".join(items)}</ul>'


def _families(data: Data) -> str:
    names = "".join(f'<th scope="col">{backend["name"]}</th>' for backend in data["backends"])
    rows = []
    for level, families in tested_levels(data).items():
        rows.append(f'<tr class="group"><th colspan="{1 + len(data["backends"])}">{level}</th></tr>')
        for family in families:
            cells = [family_cell(data, backend, family) for backend in data["backends"]]
            shown = "".join(_family(cell) for cell in cells)
            rows.append(f'<tr><th scope="row">{family_title(family)}</th>{shown}</tr>')
    return (
        "<h2>By family</h2>\n<p>The largest error in each family of cases, and the case that shows it.</p>\n"
        f'<div class="scroll"><table class="grid"><thead><tr><th></th>{names}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _family(cell: Cell) -> str:
    where = f" <small>{cell.case.removeprefix('SA-')}</small>" if cell.case else ""
    if cell.share is None:
        return f'<td class="{cell.kind}">{cell.text}{where}</td>'
    return f'<td class="tint" style="--share:{100 * min(1.0, cell.share):.0f}%">{cell.text}{where}</td>'


def _worst(data: Data) -> str:
    rows = []
    for backend, outcome, share in worst(data, 10):
        limit = allowed(data, outcome)
        rows.append(
            f"<tr><td>{backend['name']}</td><td>{outcome['case']} {outcome['title']} "
            f'<span class="soft">{outcome["dtype"]}, {outcome["layout"]}</span></td>'
            f'<td class="measure">{_bar(share)}</td><td class="number">{multiple(max(outcome["ratios"].values()))} of {limit:g}</td></tr>'
        )
    if not rows:
        return ""
    return (
        "<h2>Closest to the limit</h2>\n"
        '<div class="scroll"><table><thead><tr><th>backend</th><th>case</th><th class="measure"></th><th>× noise floor</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _trajectories(data: Data) -> str:
    trained = {name for row in data["trajectories"] for name in row["losses"]}
    names = [backend["name"] for backend in data["backends"] if backend["name"] in trained]
    styles = {name: f"c{index % _COLOURS}" for index, name in enumerate(names)}
    legend = "".join(
        f'<li><i class="{style}"></i>{name}</li>'
        for name, style in {"float64 definition": "reference", **styles}.items()
    )
    first = [row for row in data["trajectories"] if row["dtype"] == "float32"]
    rest = [row for row in data["trajectories"] if row["dtype"] != "float32"]
    figures = "".join(_figures(row, styles, data) for row in first)
    more = ""
    if rest:
        others = "".join(_figures(row, styles, data) for row in rest)
        more = f'<details><summary>The same in {rest[0]["dtype"]}</summary><div class="figures">{others}</div></details>'
    return (
        "<h2>Training</h2>\n"
        "<p>200 optimiser steps from equal weights on equal batches, with the gradients of each backend. The charts show "
        "the loss, and its deviation from the loss of the float64 definition. The green area is allowed: a multiple of the "
        "deviation of the definition itself in the same arithmetic.</p>\n"
        f'<ul class="legend">{legend}</ul>\n<div class="figures">{figures}</div>{more}'
    )


def _figures(row: Data, styles: Mapping[str, str], data: Data) -> str:
    curves: Mapping[str, Sequence[float | None]] = row["losses"]
    title = f"{row['title']}, {row['dtype']}"
    loss = Chart(
        f"Loss: {title}",
        [
            Line("float64 definition", row["reference"], "reference"),
            *(Line(name, losses, styles[name]) for name, losses in curves.items()),
        ],
    )
    factor = allowed(data, row)
    error = Chart(
        f"Deviation of the loss: {title}",
        [Line(name, _deviation(losses, row["reference"]), styles[name]) for name, losses in curves.items()],
        log=True,
        band=[factor * floor for floor in row["floors"]],
    )
    caption = f"{row['title']} <span class='soft'>{row['case']}, {row['dtype']}</span>"
    return (
        f"<figure><figcaption>{caption}: loss</figcaption>{as_svg(loss)}</figure>"
        f"<figure><figcaption>{caption}: deviation</figcaption>{as_svg(error)}</figure>"
    )


def _deviation(losses: Sequence[float | None], reference: Sequence[float]) -> list[float | None]:
    """Absolute differences. None where a logarithmic axis cannot show the difference."""
    return [
        None if loss is None or loss == wanted else abs(loss - wanted)
        for loss, wanted in zip(losses, reference, strict=False)
    ]


def _kills(data: Data) -> str:
    rows = []
    for kill in data["kills"]:
        if kill["killed"]:
            by = f"{kill['case']} <span class='soft'>{kill['dtype']}</span>"
            ratio = "–" if kill["ratio"] is None else multiple(kill["ratio"])
        else:
            by, ratio = '<span class="badge bad">survived</span>', "–"
        seen = f'<br><span class="soft">{kill["seen_in"]}</span>' if kill["seen_in"] else ""
        rows.append(
            f'<tr><td>{kill["mutant"]}{seen}</td><td>{by}</td><td class="number">{ratio}</td>'
            f'<td class="number">{kill["failed"]} of {kill["asked"]}</td></tr>'
        )
    killed = sum(kill["killed"] for kill in data["kills"])
    return (
        "<h2>Mutants</h2>\n"
        f"<p>{killed} of {len(data['kills'])} mutants were caught. A mutant is a deliberately broken "
        "implementation. The kit runs it on the cases that should catch it. The table names the case with the largest "
        "error, in multiples of the noise floor.</p>\n"
        '<div class="scroll"><table><thead><tr><th>mutant</th><th>caught by</th><th>× noise floor</th>'
        f"<th>cases</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _bar(share: float | None) -> str:
    if share is None:
        return "<span></span>"
    over = " over" if share > 1 else ""
    return f'<span class="bar{over}"><i style="width:{100 * min(1.0, share):.1f}%"></i></span>'


def _limits(data: Data) -> str:
    parts = [f"{factor:g} in {precisions}" for factor, precisions in precisions_by_factor(data).items()]
    return f"Up to {', '.join(parts)} passes"
