"""The reports of a conformance run: a table for people and JSON for programs."""

import platform
from collections.abc import Sequence
from typing import Any

import numpy as np

from selfattn_core.conformance.cases import FAMILIES
from selfattn_core.conformance.outcome import Outcome
from selfattn_core.conformance.runner import BackendReport
from selfattn_core.conformance.tolerance import FACTOR, FACTORS

__all__ = ["as_json", "as_table"]

SCHEMA = 1


def as_table(reports: Sequence[BackendReport]) -> str:
    """Case family × backend: the worst error in noise floors and the case that gave it.

    Args:
        reports: one for each backend.
    """
    families = [family for family in FAMILIES if any(_outcomes(report, family) for report in reports)]
    rows = [["", *(report.name for report in reports)]]
    rows += [[family, *(_cell(report, family) for report in reports)] for family in families]
    rows.append(["conformant", *(report.level or "-" for report in reports)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines += [
        "",
        (
            f"Numbers are errors as multiples of the noise floor; up to {FACTOR:g} × passes, "
            f"{FACTORS['float16']:g} × in 16 bits. Versions:"
        ),
    ]
    for report in reports:
        versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
        lines.append(f"  {report.name}: {versions or '-'}")
    lines.append(f"  spec: numpy {np.__version__}, Python {platform.python_version()}, {platform.machine()}")
    for report in reports:
        lines += _problems(report)
    return "\n".join(lines)


def as_json(reports: Sequence[BackendReport], seed: int) -> dict[str, Any]:
    """The same as data, with every verdict.

    Args:
        reports: one for each backend.
        seed: of the inputs.
    """
    return {
        "schema": SCHEMA,
        "seed": seed,
        "factor": FACTOR,
        "versions": {
            "numpy": np.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
        "backends": [
            {
                "name": report.name,
                "passed": report.passed,
                "level": report.level,
                "claims": list(report.claims),
                "layouts": list(report.layouts),
                "dtypes": list(report.dtypes),
                "seconds": round(report.seconds, 2),
                "versions": dict(report.versions),
                "missing": list(report.missing),
                "error": report.error,
                "outcomes": [_outcome(outcome) for outcome in report.outcomes],
            }
            for report in reports
        ],
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
        "message": outcome.message,
        "seconds": outcome.seconds,
        "reason": outcome.reason,
        "link": outcome.link,
        # JSON has no infinity: a comparison that could not be made has no ratio.
        "ratios": {v.quantity: v.ratio if np.isfinite(v.ratio) else None for v in outcome.verdicts},
    }


def _outcomes(report: BackendReport, family: str) -> list[Outcome]:
    return [outcome for outcome in report.outcomes if outcome.run.case.family == family]


def _cell(report: BackendReport, family: str) -> str:
    if report.missing or report.error:
        return "missing" if report.missing else "error"
    outcomes = _outcomes(report, family)
    claimed = [outcome for outcome in outcomes if outcome.status != "unclaimed"]
    if not claimed:
        return "unclaimed"
    bad = [outcome for outcome in claimed if outcome.status in ("fail", "error")]
    if bad:
        return f"{len(bad)} of {len(claimed)} FAILED"
    expected = [outcome for outcome in claimed if outcome.status == "expected-failure"]
    if expected:
        return f"{len(expected)} of {len(claimed)} fail as expected"
    exact = {"params": "bit for bit", "init": "passed", "memory": "passed"}
    if family in exact:
        return exact[family]
    worst = max(claimed, key=lambda outcome: outcome.ratio)
    return f"{worst.ratio:.2f} × ({worst.run.case.id})"


def _problems(report: BackendReport) -> list[str]:
    if report.missing:
        return [
            "",
            f"{report.name}: {', '.join(report.missing)} not installed: pip install 'selfattn[{report.extra}]'",
        ]
    if report.error:
        return ["", f"{report.name}: did not start: {report.error}"]
    bad = [outcome for outcome in report.outcomes if outcome.status in ("fail", "error")]
    lines = [""] if bad else []
    for outcome in bad[:10]:
        run = outcome.run
        lines.append(
            f"{report.name}: {run.case.id} ({run.case.title}; {run.dtype}, {run.layout}): {outcome.status}: {outcome.message}"
        )
    if len(bad) > 10:
        lines.append(f"{report.name}: and {len(bad) - 10} more; --json FILE lists them all")
    return lines
