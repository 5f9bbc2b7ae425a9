"""Choosing runs by name and repeating them, to debug a failure."""

import difflib
from collections.abc import Iterable

from selfattn_core.conformance.cases.case import Run
from selfattn_core.conformance.cases.families import Level
from selfattn_core.conformance.cases.table import all_runs
from selfattn_core.conformance.execution.in_process import judge_in_process
from selfattn_core.conformance.execution.runner import run_backend
from selfattn_core.conformance.protocol import Backend
from selfattn_core.conformance.results import Outcome

__all__ = ["case_names", "named_runs", "run_case"]


def run_case(backend: Backend | str, case: str, *, seed: int = 0, device: str = "") -> tuple[Outcome, ...]:
    """Run one case on a backend and judge its answers.

    A backend object runs in this process, where you can debug it. Its framework keeps its own settings, so on an
    accelerator it may compute float32 less precisely than in a report. A named backend runs in its own process, as with
    `selfattn conform`.

    Args:
        backend: an object with the methods of `Backend`, a name in `KNOWN`, or "module:object". An object that
            computes over several processes is inside its `over` already.
        case: the name of a case or run: "SA-FWD-001", "SA-FWD-001/float32" or "SA-FWD-001/float32/channels_last".
        seed: the seed of the random inputs.
        device: the device to compute on. Only a named backend accepts one: an object computes where it is.

    Returns:
        One outcome for each run with that name, with a verdict for each quantity. Runs that a backend object does not
        claim are left out.

    Raises:
        ValueError: if the case or the backend does not exist, if a named backend does not start, or if an object is to
            compute on a device.

    Example:
        >>> from selfattn_core.conformance.reference import Reference
        >>> (outcome,) = run_case(Reference(), "SA-FWD-001/float32/channels_last")
        >>> outcome.status, [verdict.quantity for verdict in outcome.verdicts]
        ('pass', ['y'])
    """
    runs = named_runs([case])
    if not isinstance(backend, str):
        if device:
            raise ValueError(
                f"only a named backend accepts a device: got device {device!r} with an object of {type(backend).__name__}. "
                'Name the backend, as in "torch" or "module:object", or pass an object that computes there.'
            )
        return tuple(judge_in_process(backend, runs, seed))
    report = run_backend(backend, seed=seed, runs=runs, device=device)
    if report.missing or report.error:
        reason = f"{', '.join(report.missing)} not installed" if report.missing else report.error
        raise ValueError(f"backend {backend!r} did not start: {reason}")
    return report.outcomes


def named_runs(names: Iterable[str], *, level: Level = "deploy") -> list[Run]:
    """The runs with these names, in the order of the table.

    Args:
        names: names such as "SA-FWD-001", "SA-FWD-001/float32" or "SA-FWD-001/float32/channels_last".
        level: the highest level to search.

    Raises:
        ValueError: if no run has one of the names. The message lists every such name.

    Example:
        >>> [run.id for run in named_runs(["SA-FWD-001/float64"])]
        ['SA-FWD-001/float64/channels_last']
    """
    every = all_runs(level=level)
    chosen: set[Run] = set()
    problems = []
    for name in names:
        # The table lists runs whose layout does not matter as channels_last. A backend that only has channels_first reports
        # them as channels_first.
        known = [run for run in every if run.is_named(name)] or [
            run for run in every if f"{run.case.id}/{run.dtype}/channels_first" == name
        ]
        if not known:
            near = difflib.get_close_matches(name, [each for run in every for each in _names(run)], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"case {name}: not in the table up to level {level}{hint}")
        chosen.update(known)
    if problems:
        raise ValueError("; ".join(problems))
    return [run for run in every if run in chosen]


def case_names(beginning: str) -> list[str]:
    """The names that begin with some text: cases, after one slash their dtypes, and after two their layouts.

    Args:
        beginning: the text that the user has typed.

    Example:
        >>> case_names("SA-FWD-001/float6")
        ['SA-FWD-001/float64']
    """
    depth = min(beginning.count("/"), 2)
    names = dict.fromkeys(_names(run)[depth] for run in all_runs())
    return [name for name in names if name.startswith(beginning)]


def _names(run: Run) -> tuple[str, str, str]:
    return run.case.id, f"{run.case.id}/{run.dtype}", run.id
