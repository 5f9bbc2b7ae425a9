"""The report as Markdown, for a pull request or a README."""

from selfattn_core.conformance.report.summary import (
    Data,
    allowed,
    device_words,
    family_cell,
    family_title,
    has_cases,
    level_cell,
    multiple,
    problems,
    search_words,
    tested_levels,
    verdict,
    worst,
)

__all__ = ["as_markdown"]

_MARKS = {"good": "✅", "bad": "❌", "expected": "🟡", "unclaimed": "–", "absent": "❔"}
_MOST_PROBLEMS = 50


def as_markdown(data: Data) -> str:
    """The report with verdict, scorecard by level, worst error by family, problems, mutants and versions.

    Args:
        data: the report.
    """
    good, words = verdict(data)
    lines = [f"## {'✅' if good else '❌'} selfattn conformance", "", _escaped(words), ""]
    asked = has_cases(data)
    if asked:
        lines += [*_scorecard(data), "", *_families(data), ""]
    if data["backends"]:
        lines += [*_searches(data), *_problems(data)]
    if asked:
        lines += _worst(data)
    if data["kills"]:
        lines += [*_kills(data), ""]
    lines += ["| | versions |", "|---|---|"]
    for name, versions in [
        *((backend["name"], backend["versions"]) for backend in data["backends"]),
        ("spec", data["versions"]),
    ]:
        listed = ", ".join(f"{key} {value}" for key, value in versions.items())
        lines.append(f"| {_escaped(name)} | {_escaped(listed)} |")
    placed = [(backend["name"], words) for backend in data["backends"] if (words := device_words(backend))]
    if placed:
        lines += ["", "| | device |", "|---|---|"]
        lines += [f"| {_escaped(name)} | {_escaped(words)} |" for name, words in placed]
    return "\n".join(lines) + "\n"


def _scorecard(data: Data) -> list[str]:
    levels = list(tested_levels(data))
    lines = [f"| backend | {' | '.join(levels)} | conformant at |", f"|---|{'---|' * len(levels)}---|"]
    for backend in data["backends"]:
        cells = [level_cell(data, backend, level) for level in levels]
        shown = " | ".join(f"{_MARKS[cell.kind]} {cell.text}" for cell in cells)
        lines.append(f"| {_escaped(backend['name'])} | {shown} | {backend['level'] or 'no level'} |")
    return lines


def _families(data: Data) -> list[str]:
    names = [_escaped(backend["name"]) for backend in data["backends"]]
    lines = [
        "Worst error by family, as a multiple of the noise floor:",
        "",
        f"| | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for families in tested_levels(data).values():
        for family in families:
            cells = [family_cell(data, backend, family) for backend in data["backends"]]
            if any(cell.text != "–" for cell in cells):
                lines.append(f"| {family_title(family)} | {' | '.join(cell.text for cell in cells)} |")
    return lines


def _searches(data: Data) -> list[str]:
    lines = [
        f"- Search of {_escaped(backend['name'])}: {_escaped(words)}."
        for backend in data["backends"]
        if (words := search_words(backend))
    ]
    return [*lines, ""] if lines else []


def _problems(data: Data) -> list[str]:
    lines = []
    for backend in data["backends"]:
        if wrong := problems(data, backend):
            lines += [f"### {_escaped(backend['name'])}", ""]
            for problem in wrong[:_MOST_PROBLEMS]:
                lines.append(f"- {_escaped(problem.words)}")
                lines += [f"  <br>{_code(problem.command)}"] if problem.command else []
            if len(wrong) > _MOST_PROBLEMS:
                lines.append(f"- and {len(wrong) - _MOST_PROBLEMS} more")
            lines.append("")
    return lines


def _worst(data: Data) -> list[str]:
    lines = [
        "<details><summary>Worst cases</summary>",
        "",
        "| backend | case | error / floor | allowed |",
        "|---|---|---|---|",
    ]
    for backend, outcome, _ in worst(data, 10):
        limit = allowed(data, outcome)
        lines.append(
            f"| {_escaped(backend['name'])} | {outcome['case']} ({_escaped(outcome['title'])}; {outcome['dtype']}, "
            f"{outcome['layout']}) | {multiple(max(outcome['ratios'].values()))} | {limit:g} × |"
        )
    return [*lines, "", "</details>", ""]


def _kills(data: Data) -> list[str]:
    lines = ["| mutant | seen in | caught by | multiple of the floor |", "|---|---|---|---|"]
    for kill in data["kills"]:
        ratio = "–" if kill["ratio"] is None else multiple(kill["ratio"])
        by = f"{kill['case']} ({kill['dtype']})" if kill["killed"] else "❌ nothing"
        lines.append(f"| {_escaped(kill['mutant'])} | {_escaped(kill['seen_in'])} | {by} | {ratio} |")
    return lines


def _code(words: str) -> str:
    """Markdown code, or escaped text if the words contain a character that would end the code."""
    return _escaped(words) if "`" in words or "\n" in words else f"`{words}`"


def _escaped(words: str) -> str:
    """One line in which Markdown and tables find no markup and no link."""
    flat = " ".join(words.split())
    for character in "\\`|<>*_[]":
        flat = flat.replace(character, f"\\{character}")
    # GitHub also makes a link of a bare address.
    return flat.replace("://", ":\\/\\/").replace("www.", "www\\.")
