"""Runs backends in processes of their own, and compares what they answer with the spec."""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import repeat, zip_longest
from pathlib import Path
from threading import Event

from selfattn_core.conformance.backend import REGISTRY, Registered, is_target
from selfattn_core.conformance.cases import Level
from selfattn_core.conformance.environment import cores, environment
from selfattn_core.conformance.outcome import BackendReport
from selfattn_core.conformance.runs import Run, all_runs
from selfattn_core.conformance.session import Session
from selfattn_core.installed import missing_modules

__all__ = ["run_backend", "run_backends"]

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

    Raises:
        ValueError: if the name is neither.
        concurrent.futures.CancelledError: if it was told to stop.
    """
    if name not in REGISTRY and not is_target(name):
        raise ValueError(
            f"backend {name!r}: expected one of {', '.join(REGISTRY)}, or module:object for your own."
        )
    registered = REGISTRY.get(name, Registered(name, (), ""))
    missing = missing_modules(registered.requires)
    if missing:
        return BackendReport(name, missing=tuple(missing), extra=registered.extra)
    began = time.monotonic()
    # Of a backend in parts there is nothing but them: in one thread, what threads do to one another would not be seen.
    variables = environment(
        registered.environment,
        processes=max(parts, processes),
        least_threads=min(2, parts),
        programs=programs,
    )
    asked = all_runs() if runs is None else runs
    parts = max(1, min(parts, len(asked)))
    stop = Event() if stop is None else stop

    def part(index: int) -> BackendReport:
        with tempfile.TemporaryDirectory(prefix="selfattn-conform-") as scratch:
            mine = asked[index::parts]
            return Session(registered.target, variables, Path(scratch), mine, seed, timeout, stop).report(
                name
            )

    with _threads(parts, stop) as pool:
        reports = list(pool.map(part, range(parts)))
    if any(not each.error for each in reports):
        # Some things, such as a device, only one process can hold.
        reports = [part(index) if each.error else each for index, each in enumerate(reports)]
    report = _whole(reports)
    return replace(report, seconds=time.monotonic() - began)


def run_backends(
    names: Sequence[str],
    *,
    seed: int = 0,
    level: Level = "deploy",
    timeout: float = 120.0,
    tell: Callable[[str, str], None] = lambda _, __: None,
) -> list[BackendReport]:
    """Run backends in two processes at a time where there is more than one core; of a single one, each has half the runs.

    Args:
        names: as for `run_backend`.
        seed: of the inputs.
        level: how far to go.
        timeout: seconds that one run may take.
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
        )
        tell(name, _summary(report))
        return report

    with (
        tempfile.TemporaryDirectory(prefix="selfattn-programs-") as programs,
        _threads(processes, stop) as pool,
    ):
        return list(pool.map(one, names, repeat(programs)))


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


def _whole(parts: Sequence[BackendReport]) -> BackendReport:
    """One report of what was divided run by run; of a backend that did not start, the first that says so."""
    if failed := [report for report in parts if report.error]:
        return failed[0]
    turns = zip_longest(*(report.outcomes for report in parts))
    outcomes = tuple(outcome for turn in turns for outcome in turn if outcome is not None)
    return replace(parts[0], outcomes=outcomes)


def _summary(report: BackendReport) -> str:
    if report.missing:
        return f"{', '.join(report.missing)} not installed"
    if report.error:
        return "did not start"
    counts = Counter(outcome.status for outcome in report.outcomes)
    return ", ".join(f"{count} {status}" for status, count in counts.items()) + f" in {report.seconds:.0f} s"
