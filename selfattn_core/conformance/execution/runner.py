"""Running backends in separate processes, and judging their answers."""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from threading import Event

from selfattn_core.conformance.backends import KNOWN, OVER_PROCESSES, Registered, is_target
from selfattn_core.conformance.cases.case import Run
from selfattn_core.conformance.cases.families import FAMILIES, Level
from selfattn_core.conformance.cases.table import all_runs
from selfattn_core.conformance.execution.devices import WORDS, Device, device_problem, device_variables
from selfattn_core.conformance.execution.environment import cores, environment
from selfattn_core.conformance.execution.outcomes import as_expected, outcome_of
from selfattn_core.conformance.execution.supervisor import Supervisor
from selfattn_core.conformance.results import BackendReport, Outcome
from selfattn_core.conformance.verdicts.product_formats import coarsest
from selfattn_core.installed import missing_modules

__all__ = ["named", "placed", "run_backend", "run_backends", "unknown_device"]

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
    over: int | None = None,
) -> BackendReport:
    """Run a backend in its own process, and judge its answers.

    If a run hangs or ends the process, the run is an error. A new process continues with the next run.

    Args:
        name: a name in `KNOWN`, or "module:object" for another backend.
        seed: the seed of the inputs.
        runs: the runs. By default all.
        timeout: the seconds that one run may take.
        parts: the number of processes of this backend that run at once. Each gets a part of the runs.
        processes: the number of all processes that run at once, as for `environment`.
        programs: the folder in which JAX caches compiled programs, as for `environment`.
        stop: an event that another thread can set to end the processes.
        device: the device to compute on, such as "cuda:1". Empty for the CPU, or for a backend that accepts no device.
        over: the number of processes that a backend with the method `over` computes over. None for its own choice.

    Raises:
        ValueError: if the name has neither form, or the framework cannot have the device.
        concurrent.futures.CancelledError: if `stop` is set.
    """
    registered = named(name, device)
    missing = missing_modules(registered.requires)
    if missing:
        return BackendReport(name, missing=tuple(missing), extra=registered.extra)
    began = time.monotonic()
    # A backend that runs in parts runs alone. Each part gets two threads, because one would hide threading bugs.
    asked = all_runs() if runs is None else runs
    shipped = [index for index, run in enumerate(asked) if FAMILIES[run.case.family].default_precision]
    strict = [index for index in range(len(asked)) if index not in shipped]
    # A backend over several processes keeps all cores busy by itself.
    parts = 1 if over is not None or name in OVER_PROCESSES else max(1, min(parts, len(strict)))
    # The framework's default precision needs its own process, without the variables for full precision.
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
        variables = placed(name, device, variables)
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
                over=over,
            )
            supervisor.work()
            return _report(name, supervisor)

    with _threads(parts, stop) as pool:
        reports = list(pool.map(part, range(len(shares))))
    if any(not each.error for each in reports):
        # Some resources, such as a device, allow only one process. Run the failed parts again, one after another.
        reports = [part(index) if each.error else each for index, each in enumerate(reports)]
    report = _whole(asked, shares, reports)
    return replace(report, seconds=time.monotonic() - began)


def named(name: str, device: str) -> Registered:
    """What is known about a backend.

    Args:
        name: a name in `KNOWN`, or "module:object" for another backend.
        device: the device to compute on. Empty for the default.

    Raises:
        ValueError: if the name has neither form, or the framework cannot have the device.
    """
    if name not in KNOWN and not is_target(name):
        raise ValueError(
            f"backend {name!r}: expected one of {', '.join(KNOWN)}, or module:object for your own."
        )
    if problem := unknown_device(name, device or None):
        raise ValueError(f"backend {name!r}: {problem}.")
    return KNOWN.get(name, Registered(name, (), ""))


def placed(name: str, device: str, variables: Mapping[str, str]) -> dict[str, str]:
    """An environment with what the framework needs to find the device and no other.

    Args:
        name: as for `named`.
        device: the device to compute on. Empty for the CPU.
        variables: the environment.
    """
    if name not in KNOWN:
        return dict(variables)
    of_device = device_variables(KNOWN[name].framework, device or "cpu", variables)
    return {key: value for key, value in {**variables, **of_device}.items() if value is not None}


def unknown_device(name: str, device: str | None) -> str:
    """The reason why a backend cannot have a device of this name. Empty if it can, or if only its own process knows.

    Args:
        name: the name of the backend.
        device: the name that the user gave. None for no option.

    Example:
        >>> unknown_device("torch", None)
        ''
        >>> unknown_device("my_package.mine:Backend", "")
        "got device ''; expected a word of this backend's own, or no option at all for its default"
    """
    if device is None:
        return ""
    if name not in KNOWN:
        # Its process would treat an empty name as no option.
        own = "expected a word of this backend's own, or no option at all for its default"
        return "" if device else f"got device {device!r}; {own}"
    return device_problem(device, WORDS[KNOWN[name].framework])


def run_backends(
    names: Sequence[str],
    *,
    seed: int = 0,
    level: Level = "deploy",
    timeout: float = 120.0,
    device: str = "",
    over: int | None = None,
    tell: Callable[[str, str], None] = lambda _, __: None,
) -> list[BackendReport]:
    """Run backends in two processes at a time if there are two cores. A single backend is divided between both.

    Args:
        names: as for `run_backend`.
        seed: the seed of the inputs.
        level: the highest level.
        timeout: the seconds that one run may take.
        device: as for `run_backend`.
        over: as for `run_backend`.
        tell: called from another thread with the name of each finished backend and a summary of its results.

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
            over=over,
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
    """A pool of threads. An exception while waiting for it, such as that of Ctrl-C, sets `stop`."""
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
    """One report from the reports of the parts. If the backend did not start, it is the first report with that error.

    If only the process of the family "shipped" did not start, its runs are errors, and the other runs keep their answers.

    Args:
        asked: all runs.
        shares: for each part, the indices of its runs in `asked`.
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
    """The outcomes of a part that did not start. `other` is a part that did start, and shows the claims of the backend."""
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
