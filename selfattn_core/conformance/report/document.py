"""The report as data: the content of the JSON file. `schema.json` describes it, and the other forms are made from it."""

import datetime as dt
import json
import platform
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from selfattn_core import __version__, spec
from selfattn_core.conformance.cases.families import LEVELS, Level
from selfattn_core.conformance.mutants.selftest import Kill
from selfattn_core.conformance.results import BackendReport, Outcome
from selfattn_core.conformance.search.finding import Finding, Search, Skipped
from selfattn_core.conformance.verdicts.tolerance import FACTORS, SHIPPED_FACTORS

__all__ = ["SCHEMA", "as_data", "schema"]

SCHEMA = 1

# The control characters of ASCII and Latin-1, and the other characters that XML does not allow.
_UNSHOWN = {code: None for code in (*range(32), *range(127, 160), 0xFFFE, 0xFFFF) if chr(code) not in "\t\n"}


def as_data(
    reports: Sequence[BackendReport],
    *,
    seed: int = 0,
    level: Level = "deploy",
    kills: Sequence[Kill] = (),
    device: str = "",
) -> dict[str, Any]:
    """All results, with every verdict.

    Args:
        reports: one for each backend.
        seed: the seed of the inputs.
        level: the requested level.
        kills: the result of each mutant.
        device: the requested device. Empty for none.
    """
    labels = {outcome.label for report in reports for outcome in report.outcomes}
    return {
        "schema": SCHEMA,
        "selfattn": __version__,
        "spec": spec.VERSION,
        "created": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "level": level,
        "device": device,
        "levels": {name: list(families) for name, families in LEVELS.items()},
        "factors": {
            **FACTORS,
            **{
                label: factor
                for label, factor in SHIPPED_FACTORS.items()
                if label in labels and label not in FACTORS
            },
        },
        "versions": {
            "numpy": np.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
        "backends": [_backend(report) for report in reports],
        "trajectories": _trajectories(reports),
        "kills": [_kill(kill) for kill in kills],
    }


def schema() -> dict[str, Any]:
    """The JSON schema of `as_data`."""
    text = files("selfattn_core.conformance.report").joinpath("schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def _backend(report: BackendReport) -> dict[str, Any]:
    return {
        "name": _shown(report.name),
        "passed": report.passed,
        "level": report.level,
        "claims": list(report.claims),
        "layouts": list(report.layouts),
        "dtypes": list(report.dtypes),
        "seconds": round(report.seconds, 2),
        "versions": {_shown(name): _shown(version) for name, version in report.versions.items()},
        "missing": list(report.missing),
        "extra": report.extra,
        "error": _shown(report.error),
        "absent": report.absent,
        "device": {
            "name": _shown(report.device.name),
            "model": _shown(report.device.model),
            "driver": _shown(report.device.driver),
            "precisions": {_shown(way): label for way, label in report.device.precisions.items()},
        },
        "outcomes": [_outcome(outcome) for outcome in report.outcomes],
        **({} if report.search is None else {"search": _search(report.search)}),
    }


def _outcome(outcome: Outcome) -> dict[str, Any]:
    run = outcome.run
    return {
        "case": run.case.id,
        "title": run.case.title,
        "family": run.case.family,
        "dtype": run.dtype,
        "layout": run.layout,
        "status": outcome.status,
        "message": _shown(outcome.message),
        "reason": _shown(outcome.reason),
        "link": _shown(outcome.link),
        **({"label": outcome.label} if outcome.label else {}),
        "ratios": {verdict.quantity: _number(verdict.ratio) for verdict in outcome.verdicts},
    }


def _search(search: Search) -> dict[str, Any]:
    return {
        "seed": search.seed,
        "seconds": round(search.seconds, 2),
        "budget": search.budget,
        "probes": search.probes,
        "answered": search.answered,
        "steps": search.steps,
        "ended": search.ended,
        "findings": [_finding(found) for found in search.findings],
        "skipped": [_skipped(each) for each in search.skipped],
    }


def _skipped(skipped: Skipped) -> dict[str, str]:
    return {"token": _shown(skipped.token), "why": skipped.why, "message": _shown(skipped.message)}


def _finding(found: Finding) -> dict[str, Any]:
    return {
        "property": found.property,
        "ask": found.ask,
        "quantity": _shown(found.quantity),
        "status": found.status,
        "message": _shown(found.message),
        "token": found.token,
        "words": found.words,
        "probes": found.probes,
    }


def _trajectories(reports: Sequence[BackendReport]) -> list[dict[str, Any]]:
    """The loss curves of each training case, with the curve of the spec and its noise floors."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for report in reports:
        for outcome in report.outcomes:
            if outcome.losses:
                case, dtype = outcome.run.case, outcome.run.dtype
                row = rows.setdefault(
                    (case.id, dtype),
                    {
                        "case": case.id,
                        "title": case.title,
                        "dtype": dtype,
                        "reference": list(outcome.reference),
                        "floors": list(outcome.floors),
                        "losses": {},
                    },
                )
                row["losses"][_shown(report.name)] = [_number(loss) for loss in outcome.losses]
    return list(rows.values())


def _kill(kill: Kill) -> dict[str, Any]:
    outcome = kill.outcome
    return {
        "mutant": kill.mutant.name,
        "family": kill.mutant.family,
        "seen_in": kill.mutant.seen_in,
        "killed": outcome is not None,
        "case": outcome.run.case.id if outcome else "",
        "dtype": outcome.run.dtype if outcome else "",
        "layout": outcome.run.layout if outcome else "",
        "ratio": _number(kill.multiple) if kill.multiple else None,
        "message": _shown(outcome.message) if outcome else "",
        "failed": kill.failed,
        "asked": kill.asked,
    }


def _shown(words: str) -> str:
    """Text for every form: without characters that move a terminal's cursor, and with lone surrogates escaped."""
    return words.translate(_UNSHOWN).encode("utf-8", "backslashreplace").decode("utf-8")


def _number(value: float) -> float | None:
    """A number for JSON, which has no infinity and no NaN. These become None."""
    return float(value) if np.isfinite(value) else None
