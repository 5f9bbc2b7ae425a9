"""The difference of two reports."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from selfattn_core.conformance.report.schema_check import report_problems
from selfattn_core.conformance.report.summary import Data, allowed, device_words, ratio_of, run_id

__all__ = ["Difference", "difference"]

_MOVED = 2.0
"""The factor by which a ratio must change to be listed."""

_NOTICED = 0.5
"""The share of the factor below which changes of a ratio are not listed."""

_MOST_PROBLEMS = 20


@dataclass(frozen=True)
class Difference:
    """What changed, one line each.

    Args:
        regressions: new failures, lost claims and levels, and backends that no longer start.
        fixed: failures and other problems that no longer occur.
        moved: ratios that changed by a large factor.
        versions: changed versions of libraries, the spec and the cases, and changed devices.
        notes: what could not be compared, and why.
    """

    regressions: list[str] = field(default_factory=list)
    fixed: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        titled = (
            ("regressions", self.regressions),
            ("fixed", self.fixed),
            ("errors that moved", self.moved),
            ("versions", self.versions),
            ("not compared", self.notes),
        )
        parts = [f"{title}:\n" + "\n".join(f"  {line}" for line in lines) for title, lines in titled if lines]
        return "\n".join(parts) or "nothing changed"


def difference(old: Data, new: Data) -> Difference:
    """Compare two reports.

    Args:
        old: the earlier report.
        new: the later report.

    Raises:
        ValueError: if one of them has another schema, or is not a report.
    """
    for which, data in (("first", old), ("second", new)):
        if data.get("schema") != 1:
            raise ValueError(
                f"the {which} report has schema {data.get('schema')!r}, but this selfattn reads schema 1: write it again."
            )
        if wrong := report_problems(data):
            more = f"; and {len(wrong) - _MOST_PROBLEMS} more" if len(wrong) > _MOST_PROBLEMS else ""
            raise ValueError(
                f"the {which} report is not a report of selfattn conform --json: "
                f"{'; '.join(wrong[:_MOST_PROBLEMS])}{more}. Write it again."
            )
    found = Difference()
    found.versions.extend(_versions("selfattn", {"selfattn": old["selfattn"]}, {"selfattn": new["selfattn"]}))
    found.versions.extend(_versions("spec", {"spec": old["spec"]}, {"spec": new["spec"]}))
    found.versions.extend(_versions("spec", old["versions"], new["versions"]))
    if old["seed"] != new["seed"]:
        found.notes.append(
            f"the inputs differ (seeds {old['seed']} and {new['seed']}), so errors are not compared"
        )
    if old["level"] != new["level"]:
        found.notes.append(
            f"the levels differ ({old['level']} and {new['level']}), so only the runs in both reports are compared"
        )
    before = {backend["name"]: backend for backend in old["backends"]}
    after = {backend["name"]: backend for backend in new["backends"]}
    found.notes.extend(f"{name}: only in the first report" for name in before if name not in after)
    found.notes.extend(f"{name}: only in the second report" for name in after if name not in before)
    for name, backend in after.items():
        if name in before:
            _compare(found, before[name], backend, old, new)
    return found


def _compare(found: Difference, old: Data, new: Data, first: Data, second: Data) -> None:
    name = new["name"]
    found.versions.extend(_versions(name, old["versions"], new["versions"]))
    # Older reports do not contain the device.
    if "device" in old and "device" in new:
        devices = [{"device": device_words(each) or "its own"} for each in (old, new)]
        found.versions.extend(_versions(name, *devices))
    was, now = _state(old), _state(new)
    if was != now:
        (found.regressions if now else found.fixed).append(f"{name}: {now or f'starts, before: {was}'}")
    if was or now:
        return
    runs = {run_id(outcome): outcome for outcome in old["outcomes"]}
    others = {run_id(outcome): outcome for outcome in new["outcomes"]}
    for run, outcome in others.items():
        if run in runs:
            _outcome(found, f"{name}: {run}", runs[run], outcome)
            if first["seed"] == second["seed"]:
                _ratio(found, f"{name}: {run}", runs[run], outcome, allowed(second, outcome))
    gone = [run for run in runs if run not in others]
    if gone and first["level"] == second["level"]:
        found.regressions.append(f"{name}: {len(gone)} runs are missing, such as {gone[0]}")
    if first["level"] == second["level"] and old["level"] != new["level"]:
        ranks = [None, *second["levels"]]
        better = ranks.index(new["level"]) > ranks.index(old["level"])
        words = f"{name}: conformant at {new['level'] or 'no level'}, before at {old['level'] or 'none'}"
        (found.fixed if better else found.regressions).append(words)


def _outcome(found: Difference, run: str, old: Data, new: Data) -> None:
    right = ("pass", "expected-failure")
    was, now = old["status"], new["status"]
    if was == now:
        return
    if now in ("fail", "error") and was not in ("fail", "error"):
        found.regressions.append(f"{run}: {now}, before {was}: {new['message']}")
    elif now in right and was in ("fail", "error"):
        found.fixed.append(f"{run}: {now}, before {was}")
    elif now == "unclaimed" and was in right:
        found.regressions.append(f"{run}: no longer claimed")
    elif was == "pass" and now == "expected-failure":
        found.regressions.append(f"{run}: passed before, and its failure is now expected: {new['reason']}")
    else:
        found.fixed.append(f"{run}: {now}, before {was}")


def _ratio(found: Difference, run: str, old: Data, new: Data, factor: float) -> None:
    was, now = ratio_of(old), ratio_of(new)
    if was is None or now is None or max(was, now) < _NOTICED * factor:
        return
    if max(was, now) > _MOVED * min(was, now):
        found.moved.append(f"{run}: {now:.3g} × the noise floor, before {was:.3g} ×")


def _state(backend: Data) -> str:
    if backend["missing"]:
        return f"{', '.join(backend['missing'])} not installed"
    return f"did not start: {backend['error'].splitlines()[-1]}" if backend["error"] else ""


def _versions(name: str, old: Data, new: Data) -> Iterator[str]:
    for key in {**old, **new}:
        if old.get(key) != new.get(key):
            yield f"{name}: {key} {old.get(key, 'none')} → {new.get(key, 'none')}"
