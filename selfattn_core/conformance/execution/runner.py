"""Runs backends in processes of their own, and compares what they answer with the spec."""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from threading import Event

from selfattn_core.conformance.backends import REGISTRY, Registered, is_target
from selfattn_core.conformance.cases.case import Run
from selfattn_core.conformance.cases.families import FAMILIES, Level
from selfattn_core.conformance.cases.table import all_runs
from selfattn_core.conformance.execution.devices import WORDS, Device, device_problem, device_variables
from selfattn_core.conformance.execution.environment import cores, environment
from selfattn_core.conformance.execution.supervisor import Supervisor
from selfattn_core.conformance.results import BackendReport, Outcome
from selfattn_core.conformance.verdicts.outcomes import as_expected, outcome_of
from selfattn_core.conformance.verdicts.product_formats import coarsest
from selfattn_core.installed import missing_modules

__all__ = ["run_backend", "run_backends", "unknown_device"]

_MOST_AT_ONCE = 2


def run_backend(
    name: str,
    *,
    seed: int = 0,
    runs: Sequence[Run] | None = None,
    timeout: float = 120.0,
    parts: int = 1,
    processes: int = 1,
    programs: Path | None = None,
    stop: Event | None = None,
    device: str = "",
) -> BackendReport:
    """Start a backend in a process of its own, ask it everything and compare.

    A run that hangs or takes the process down is an error in that run, and the runs after it are asked of a new process.

    Args:
        name: one of `REGISTRY`, or "module:object" for another one.
        seed: of the inputs.
        runs: which; by default all.
        timeout: seconds that one run may take.
        parts: processes of this backend that run at once, each with its part of the runs.
        processes: that run at once in all, as for `environment`.
        programs: where JAX keeps what it has compiled, as for `environment`.
        stop: ends the processes when it is set, from another thread.
        device: to compute on, as in "cuda:1"; empty for the CPU, or for a backend of your own that takes none.

    Raises:
        ValueError: if the name is neither, or the device is none of its framework.
        concurrent.futures.CancelledError: if it was told to stop.
    """
    if name not in REGISTRY and not is_target(name):
        raise ValueError(
            f"backend {name!r}: expected one of {', '.join(REGISTRY)}, or module:object for your own."
        )
    if problem := unknown_device(name, device or None):
        raise ValueError(f"backend {name!r}: {problem}.")
    registered = REGISTRY.get(name, Registered(name, (), ""))
    missing = missing_modules(registered.requires)
    if missing:
        return BackendReport(name, missing=tuple(missing), extra=registered.extra)
    began = time.monotonic()
    # Of a backend in parts there is nothing but them: in one thread, what threads do to one another would not be seen.
    asked = all_runs() if runs is None else runs
    shipped = [index for index, run in enumerate(asked) if FAMILIES[run.case.family].default_precision]
    strict = [index for index in range(len(asked)) if index not in shipped]
    parts = max(1, min(parts, len(strict)))
    # What the framework does by default is asked of a process that is told nothing else.
    shares = [strict[first::parts] for first in range(parts)] + [shipped]
    shares = [share for share in shares if share] or [[]]
    stop = Event() if stop is None else stop

    def part(index: int) -> BackendReport:
        mine = [asked[run] for run in shares[index]]
        as_shipped = shares[index] == shipped != []
        variables = environment(
            registered.environment if as_shipped else registered.in_full,
            processes=max(parts, processes),
            least_threads=min(2, parts),
            programs=programs,
            shipped=as_shipped,
        )
        if name in REGISTRY:
            placed = device_variables(registered.framework, device or "cpu", variables)
            variables = {key: value for key, value in (variables | placed).items() if value is not None}
        with tempfile.TemporaryDirectory(prefix="selfattn-conform-") as scratch:
            supervisor = Supervisor(
                registered.target,
                variables,
                Path(scratch),
                mine,
                seed,
                timeout,
                stop,
                device=device,
                shipped=as_shipped,
            )
            supervisor.work()
            return _report(name, supervisor)

    with _threads(parts, stop) as pool:
        reports = list(pool.map(part, range(len(shares))))
    if any(not each.error for each in reports):
        # Some things, such as a device, only one process can hold.
        reports = [part(index) if each.error else each for index, each in enumerate(reports)]
    report = _whole(asked, shares, reports)
    return replace(report, seconds=time.monotonic() - began)


def unknown_device(name: str, device: str | None) -> str:
    """Why a backend cannot be asked for a device; empty if it can, or only its own process knows.

    Args:
        name: of the backend.
        device: as the user spells it; None for none.

    Example:
        >>> unknown_device("torch", None)
        ''
        >>> unknown_device("my_package.mine:Backend", "")
        "got device ''; expected a word of this backend's own, or no option at all for its default"
    """
    if device is None:
        return ""
    if name not in REGISTRY:
        # To its process an empty word would be none.
        own = "expected a word of this backend's own, or no option at all for its default"
        return "" if device else f"got device {device!r}; {own}"
    return device_problem(device, WORDS[REGISTRY[name].framework])


def run_backends(
    names: Sequence[str],
    *,
    seed: int = 0,
    level: Level = "deploy",
    timeout: float = 120.0,
    device: str = "",
    tell: Callable[[str, str], None] = lambda _, __: None,
) -> list[BackendReport]:
    """Run backends in two processes at a time where there is more than one core; of a single one, each has half the runs.

    Args:
        names: as for `run_backend`.
        seed: of the inputs.
        level: how far to go.
        timeout: seconds that one run may take.
        device: as for `run_backend`.
        tell: called with a name and what is happening to it, from another thread.

    Returns:
        One report for each name, in their order.
    """
    runs = all_runs(level=level)
    processes = min(_MOST_AT_ONCE, cores())
    parts = processes if len(names) == 1 else 1
    stop = Event()

    def one(name: str, programs: str) -> BackendReport:
        report = run_backend(
            name,
            seed=seed,
            runs=runs,
            timeout=timeout,
            parts=parts,
            processes=processes,
            programs=Path(programs),
            stop=stop,
            device=device,
        )
        tell(name, _summary(report))
        return report

    with (
        tempfile.TemporaryDirectory(prefix="selfattn-programs-") as programs,
        _threads(processes, stop) as pool,
    ):
        return list(pool.map(one, names, repeat(programs)))


def _report(name: str, supervised: Supervisor) -> BackendReport:
    """Judge the answers of a backend."""
    ready, failed = supervised.ready, supervised.failed
    if ready is None:
        return BackendReport(name, error=failed.error, refused=failed.refused, absent=failed.absent)
    claims, label = ready.claimed, coarsest(supervised.precisions)

    def outcome(index: int, run: Run) -> Outcome:
        if not claims.covers(run):
            return Outcome(run, "unclaimed")
        asked = replace(run, layout=claims.layout(run))
        found = outcome_of(asked, supervised.answer(index), supervised.seed, label)
        return as_expected(found, ready.expected_failures)

    return BackendReport(
        name,
        ready.versions,
        tuple(ready.claims),
        tuple(ready.layouts),
        tuple(ready.dtypes),
        tuple(outcome(index, run) for index, run in enumerate(supervised.runs)),
        device=Device(**ready.device, precisions=supervised.precisions),
    )


@contextmanager
def _threads(number: int, stop: Event) -> Iterator[ThreadPoolExecutor]:
    """A pool whose work is told to stop where an exception, such as that of Ctrl-C, ends the wait for it."""
    with ThreadPoolExecutor(number) as pool:
        try:
            yield pool
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _whole(
    asked: Sequence[Run], shares: Sequence[Sequence[int]], parts: Sequence[BackendReport]
) -> BackendReport:
    """One report of what was divided; of a backend that did not start, the first that says so.

    That the process of the family "shipped" alone did not start is an error of its runs: the others have their answers.

    Args:
        asked: all runs.
        shares: by part, the places of its runs among all.
        parts: the reports of the parts.
    """
    started = [part for part in parts if not part.error]
    for share, part in zip(shares, parts, strict=True):
        if part.error and not (
            started and all(FAMILIES[asked[index].case.family].default_precision for index in share)
        ):
            return part
    first = started[0]
    outcomes = {
        index: outcome
        for share, part in zip(shares, parts, strict=True)
        for index, outcome in zip(
            share, part.outcomes or _died([asked[i] for i in share], part, first), strict=True
        )
    }
    precisions = next((part.device.precisions for part in started if part.device.precisions), {})
    return replace(
        first,
        outcomes=tuple(outcomes[index] for index in sorted(outcomes)),
        device=replace(first.device, precisions=precisions),
    )


def _died(runs: Sequence[Run], part: BackendReport, other: BackendReport) -> list[Outcome]:
    """What becomes of the runs of a part that did not start, of a backend that claims what another part says."""
    return [
        Outcome(run, "error", (), f"its process did not start: {part.error}")
        if other.claimed.covers(run)
        else Outcome(run, "unclaimed")
        for run in runs
    ]


def _summary(report: BackendReport) -> str:
    if report.missing:
        return f"{', '.join(report.missing)} not installed"
    if report.error:
        return "no such device" if report.absent else "did not start"
    counts = Counter(outcome.status for outcome in report.outcomes)
    return ", ".join(f"{count} {status}" for status, count in counts.items()) + f" in {report.seconds:.0f} s"
