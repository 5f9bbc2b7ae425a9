"""The summary of a report: cells of tables, worst cases and problems. Every form of the report uses it.

A report is the content of the JSON file (`schema.json`), so that a stored report can be shown again.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from selfattn_core.conformance.cases.families import FAMILIES

__all__ = [
    "Cell",
    "Data",
    "Problem",
    "allowed",
    "command_line",
    "counts",
    "device_words",
    "family_cell",
    "family_title",
    "has_cases",
    "level_cell",
    "multiple",
    "precisions_by_factor",
    "problems",
    "ratio_of",
    "replay_line",
    "run_id",
    "search_words",
    "tested_levels",
    "unanswered",
    "verdict",
    "worst",
]

Data = Mapping[str, Any]


class Problem(NamedTuple):
    """One problem of a backend.

    Args:
        words: the description. A traceback has several lines.
        command: the command that repeats the failure. Empty if the problem is not about one run.
    """

    words: str
    command: str = ""


@dataclass(frozen=True)
class Cell:
    """One field of a table.

    Args:
        kind: "good", "bad", "expected" (a known failure), "unclaimed" or "absent".
        text: the text of the field.
        share: the worst error as a share of the largest multiple that passes, 0 to 1. None without a measured error.
        case: the case with that error.
    """

    kind: Literal["good", "bad", "expected", "unclaimed", "absent"]
    text: str
    share: float | None = None
    case: str = ""


def family_title(family: str) -> str:
    """The name of a family in reports.

    Example:
        >>> family_title("r1"), family_title("determinism")
        ('R1 penalty', 'determinism')
    """
    titles: dict[str, str] = {name: row.title for name, row in FAMILIES.items()}
    return titles.get(family, family.replace("_", " "))


def run_id(outcome: Data) -> str:
    """The id of a run, such as "SA-FWD-001/float32/channels_last"."""
    return f"{outcome['case']}/{outcome['dtype']}/{outcome['layout']}"


def ratio_of(outcome: Data) -> float | None:
    """The worst error of an outcome in noise floors. None if it has no finite one."""
    ratios = list(outcome["ratios"].values())
    return None if not ratios or None in ratios else max(ratios)


def multiple(ratio: float) -> str:
    """A multiple of the noise floor as text with few digits.

    Example:
        >>> multiple(0.634), multiple(6.5e11)
        ('0.63 ×', '6.5e+11 ×')
    """
    return f"{ratio:.2f} ×" if ratio < 100 else f"{ratio:.3g} ×"


def allowed(data: Data, outcome: Data) -> float:
    """The factor of an outcome: the largest multiple of the noise floor that passes.

    Args:
        data: the report.
        outcome: an outcome of a backend, or a trajectory.
    """
    return float(data["factors"][outcome.get("label") or outcome["dtype"]])


def precisions_by_factor(data: Data) -> dict[float, str]:
    """The factors of a report, each with the precisions that it is for.

    Args:
        data: the report.

    Example:
        >>> precisions_by_factor({"factors": {"float32": 8, "bfloat16": 4, "float64": 8}})
        {8: 'float32 and float64', 4: 'bfloat16'}
    """
    found: dict[float, list[str]] = {}
    for precision, factor in data["factors"].items():
        found.setdefault(factor, []).append(precision)
    return {factor: " and ".join(precisions) for factor, precisions in found.items()}


def device_words(backend: Data) -> str:
    """The device of a backend, with its model, driver and default precisions if they are known.

    Args:
        backend: an entry of `data["backends"]`.

    Example:
        >>> precisions = {"matrix product": "float32", "convolution": "tf32"}
        >>> device_words({"device": {"name": "cuda:0", "model": "A card", "driver": "550", "precisions": precisions}})
        'cuda:0, A card, driver 550; float32 by default: matrix product in float32, convolution in tf32'
    """
    device = backend.get("device") or {"name": ""}
    if not device["name"]:
        return ""
    driver = f"driver {device['driver']}" if device["driver"] else ""
    place = ", ".join(part for part in (device["name"], device["model"], driver) if part)
    if not device["precisions"]:
        return f"{place}; float32 by default: {_why_unmeasured(backend)}"
    ways = ", ".join(f"{way} in {label}" for way, label in device["precisions"].items())
    return f"{place}; float32 by default: {ways}"


def _why_unmeasured(backend: Data) -> str:
    """The reason why the report of a backend with a device has no default precisions."""
    if "shipped" not in backend["claims"]:
        return f"not measured, because the backend does not claim {family_title('shipped')}"
    # A report has no such outcome if it is older than this family or did not include it.
    if any(outcome["family"] == "shipped" for outcome in backend["outcomes"]):
        return "could not be measured"
    return "not measured, only the level deploy measures it"


def tested_levels(data: Data) -> dict[str, list[str]]:
    """The families of each level up to the level of this report."""
    levels: dict[str, list[str]] = {}
    for level, families in data["levels"].items():
        levels[level] = list(families)
        if level == data["level"]:
            break
    return levels


def family_cell(data: Data, backend: Data, family: str) -> Cell:
    """One family of one backend.

    Args:
        data: the report.
        backend: an entry of `data["backends"]`.
        family: the family.
    """
    return _cell(data, backend, (family,))


def level_cell(data: Data, backend: Data, level: str) -> Cell:
    """The families that a level adds, for one backend.

    Args:
        data: the report.
        backend: an entry of `data["backends"]`.
        level: a name of `data["levels"]`.
    """
    return _cell(data, backend, data["levels"][level])


def worst(data: Data, number: int) -> list[tuple[Data, Data, float]]:
    """The outcomes with the largest errors, relative to their factor.

    Args:
        data: the report.
        number: the number of outcomes.

    Returns:
        (backend, outcome, share of the factor), the worst first, one for each backend and case.
    """
    found: dict[tuple[str, str], tuple[Data, Data, float]] = {}
    for backend in data["backends"]:
        for outcome in backend["outcomes"]:
            ratio = ratio_of(outcome)
            if ratio is None:
                continue
            share = ratio / allowed(data, outcome)
            key = (backend["name"], outcome["case"])
            if key not in found or share > found[key][2]:
                found[key] = (backend, outcome, share)
    return sorted(found.values(), key=lambda row: -row[2])[:number]


def unanswered(data: Data, backend: Data) -> str:
    """The reason why a backend answered no run. Empty if it answered one. A backend without answers does not pass.

    Args:
        data: the report.
        backend: an entry of `data["backends"]`.
    """
    outcomes = backend["outcomes"]
    if not outcomes or any(outcome["status"] != "unclaimed" for outcome in outcomes):
        return ""
    reason = next((outcome["message"] for outcome in outcomes if outcome["message"]), "")
    if reason:
        return f"answers no case of level {data['level']}; the first reason: {reason}"
    return f"claims no case of level {data['level']}"


def command_line(backend: str, run: str, *, seed: int = 0, device: str = "") -> str:
    """The command that repeats a run.

    Args:
        backend: the name of the backend.
        run: the id of the run.
        seed: the seed of the random inputs.
        device: the requested device. Empty for none.

    Example:
        >>> command_line("torch", "SA-FWD-001/float32/channels_last", seed=3)
        'selfattn conform torch --case SA-FWD-001/float32/channels_last --seed 3'
    """
    words = ["selfattn", "conform", backend, "--case", run]
    words += ["--seed", str(seed)] if seed else []
    words += ["--device", device] if device else []
    return shlex.join(words)


def replay_line(backend: str, token: str, *, device: str = "") -> str:
    """The command that repeats what a search found.

    Args:
        backend: the name of the backend.
        token: the token of the probe.
        device: the requested device. Empty for none.

    Example:
        >>> replay_line("torch", "S1::97fb")
        'selfattn conform torch --replay S1::97fb'
    """
    words = ["selfattn", "conform", backend, "--replay", token]
    return shlex.join([*words, "--device", device] if device else words)


def has_cases(data: Data) -> bool:
    """Whether a report is about cases. Backends that were only searched have none, and reach no level.

    Args:
        data: the data of the report.

    Example:
        >>> has_cases({"backends": [{"outcomes": [], "search": {}}]})
        False
    """
    return any(backend["outcomes"] or "search" not in backend for backend in data["backends"])


def search_words(backend: Data) -> str:
    """The extent of a backend's search, in a sentence. Empty if there was none.

    Args:
        backend: an entry of `data["backends"]`.

    Example:
        >>> search = {"seed": 3, "seconds": 60.2, "budget": 600, "probes": 600, "steps": 1700, "ended": "budget"}
        >>> search_words({"search": {**search, "findings": [], "skipped": []}})
        '600 probes with 1700 calls in 60 s at seed 3; it asked all that it was to ask, and found nothing'
    """
    search = backend.get("search")
    if not search:
        return ""
    why = {
        "budget": "it asked all that it was to ask",
        "time": f"the time ended it before it had drawn {search['budget']} probes",
        "interrupt": "it was interrupted",
        "gave up": "it gave up, after three timeouts in a row, twenty failures, or a backend that did not start again",
        "replay": "it repeated tokens",
    }[search["ended"]]
    number = len(search["findings"])
    found = "nothing" if not number else "one failure" if number == 1 else f"{number} failures"
    seed = "" if search["ended"] == "replay" else f" at seed {search['seed']}"
    extent = f"{search['probes']} probes with {search['steps']} calls in {search['seconds']:.0f} s{seed}"
    skipped = "".join(
        f"; skipped {each['token']}: {each['why']}: {each['message']}" for each in search["skipped"]
    )
    return f"{extent}; {why}, and found {found}{skipped}"


def problems(data: Data, backend: Data) -> list[Problem]:
    """The problems of a backend.

    Args:
        data: the report.
        backend: an entry of `data["backends"]`.
    """
    if backend["missing"]:
        missing = ", ".join(backend["missing"])
        return [Problem(f"{missing} not installed: pip install 'selfattn[{backend['extra']}]'")]
    if backend["error"]:
        return [Problem(backend["error"] if backend.get("absent") else f"did not start: {backend['error']}")]
    if nothing := unanswered(data, backend):
        return [Problem(nothing)]
    return [
        Problem(
            f"{outcome['case']} ({outcome['title']}; {outcome['dtype']}, {outcome['layout']}): "
            f"{outcome['status']}: {outcome['message']}",
            command_line(backend["name"], run_id(outcome), seed=data["seed"], device=data.get("device", "")),
        )
        for outcome in backend["outcomes"]
        if outcome["status"] in ("fail", "error")
    ] + [
        Problem(
            f"{found['property']} ({found['words']}): {found['status']}: {found['message']}",
            replay_line(backend["name"], found["token"], device=data.get("device", "")),
        )
        for found in backend.get("search", {}).get("findings", ())
    ]


def counts(outcomes: Iterable[Data]) -> dict[str, int]:
    """The number of outcomes with each status."""
    found: dict[str, int] = {}
    for outcome in outcomes:
        found[outcome["status"]] = found.get(outcome["status"], 0) + 1
    return found


def verdict(data: Data) -> tuple[bool, str]:
    """The whole report in a sentence, and whether everything passed.

    Args:
        data: the report.
    """
    parts, good = [], True
    backends = data["backends"]
    if backends:
        passed = [backend["name"] for backend in backends if backend["passed"]]
        absent = [backend["name"] for backend in backends if backend.get("absent")]
        failed = [b["name"] for b in backends if not b["passed"] and not b["missing"] and not b.get("absent")]
        missing = [backend["name"] for backend in backends if backend["missing"]]
        good = not failed and not missing and not absent
        if passed:
            parts.append(f"{_listed(passed)} passed every claimed check")
        if failed:
            parts.append(f"{_listed(failed)} failed")
        if missing:
            parts.append(f"{_listed(missing)} did not run: a package is not installed")
        if absent:
            parts.append(f"{_listed(absent)} did not run: this machine does not have the device")
    if data["kills"]:
        alive = [kill["mutant"] for kill in data["kills"] if not kill["killed"]]
        good = good and not alive
        if alive:
            parts.append(f"{len(alive)} of {len(data['kills'])} mutants were not caught: {_listed(alive)}")
        else:
            parts.append(f"all {len(data['kills'])} mutants were caught")
    return good, "; ".join(parts) + "."


def _cell(data: Data, backend: Data, families: Sequence[str]) -> Cell:
    if backend["missing"] or backend["error"]:
        return _unstarted(backend)
    outcomes = [outcome for outcome in backend["outcomes"] if outcome["family"] in families]
    claimed = [outcome for outcome in outcomes if outcome["status"] != "unclaimed"]
    failed = [outcome for outcome in claimed if outcome["status"] in ("fail", "error")]
    expected = [outcome for outcome in claimed if outcome["status"] == "expected-failure"]
    if not claimed:
        return Cell("unclaimed", "unclaimed" if outcomes else "–")
    if failed:
        return Cell("bad", f"{len(failed)} of {len(claimed)} FAILED", case=failed[0]["case"])
    if expected:
        return Cell(
            "expected", f"{len(expected)} of {len(claimed)} fail as expected", case=expected[0]["case"]
        )
    measured = [
        (ratio / allowed(data, outcome), ratio, outcome)
        for outcome in claimed
        if (ratio := ratio_of(outcome))
    ]
    if not measured:
        return Cell("good", "bit for bit" if tuple(families) == ("params",) else "passed")
    share, ratio, outcome = max(measured, key=lambda row: row[0])
    return Cell("good", multiple(ratio), share, outcome["case"])


def _unstarted(backend: Data) -> Cell:
    if backend["missing"]:
        return Cell("absent", "missing")
    return Cell("absent", "no such device") if backend.get("absent") else Cell("bad", "error")


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
