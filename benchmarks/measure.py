"""One job in a process of its own: check an answer, then time it, or take the peak of its memory.

Started by `bench.py` as `python -m benchmarks.measure JOB.json RESULT.json`.

Time. Every implementation of the cell is built and checked first; those that pass take turns, A B A B …, so that what
the machine does meanwhile hits all of them. A sample is the mean of so many calls as take 10 ms, the first calls are
not counted, and Python's garbage collector is off.

Memory. The implementation has the process to itself. After a tiny problem has warmed up the library (thread pools,
compilers) and the real inputs and the compiled step are there, the high-water mark of the resident memory is reset,
the step runs once, and the peak above what was resident before is taken. Outputs count. The allocator is the
system's, with its defaults, as users have it: glibc keeps freed blocks below its (moving) mmap threshold, so the peak
holds what fragmentation adds; memory that it had kept from before is given back first (malloc_trim), or it would hide
the first megabytes. Without /proc the mark cannot be reset, and what stays below an earlier peak is not seen. On
another device than the CPU the peak is that of the framework's own counters.
"""

import ctypes
import dataclasses
import gc
import importlib
import json
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.cells import CEILINGS, OURS, Cell, too_large
from benchmarks.problem import Problem
from benchmarks.step import RefusedError, Step

__all__ = ["interleaved", "main"]

_SAMPLE_SECONDS = 0.01
_LONG_SECONDS = 5.0
_MOST_SAMPLES = 60


def main(job_file: str, result_file: str) -> None:
    """Run the job that the one file describes and write what came out to the other."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    cell = Cell(**job["cell"])
    cases = importlib.import_module(f"benchmarks.{job['framework']}_cases")
    with cases.on(job["device"]) as device:
        records = _memory(cases, cell, job) if cell.measure == "memory" else _time(cases, cell, job)
        about = cases.about() | {"device": {"name": job["device"], **device}}
    Path(result_file).write_text(json.dumps({"about": about, "records": records}), encoding="utf-8")


def _time(cases: ModuleType, cell: Cell, job: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    problem = Problem.of(cell, dtype=job["dtype"])
    # In the dtype of the step, which casts nothing while it is timed.
    weight, checked_weight = (
        cases.array(values, job["dtype"]) for values in (problem.weight, problem.checked_weight)
    )
    records: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    for name in job["names"]:
        reason = too_large(name, cell, _available())
        if reason:
            records[name] = {"status": "skipped", "reason": reason}
            continue
        try:
            step = cases.build(name, problem)
            start = time.perf_counter()
            answer = step.run(checked_weight)
            cases.synchronize()
            first = time.perf_counter() - start
        except Exception as error:
            records[name] = _excuse(name, error)
            continue
        records[name] = _checked(problem, name, step, answer) | {"first_call_seconds": first}
        del answer
        if records[name]["status"] == "ok":
            steps[name] = step
    calls = {name: _call(cases, step, weight) for name, step in steps.items()}
    samples = interleaved(calls, job["seconds"])
    for name, seconds in samples.items():
        records[name] |= {
            "seconds": {
                "min": min(seconds),
                "median": statistics.median(seconds),
                "max": max(seconds),
                "samples": len(seconds),
            }
        }
    if OURS in samples:
        ours = records[OURS]["seconds"]["median"]
        for name in samples:
            records[name]["times_ours"] = records[name]["seconds"]["median"] / ours
    return records


def _call(cases: ModuleType, step: Step, weight: Any) -> Callable[[], Any]:
    def call() -> None:
        step.run(weight)
        cases.synchronize()

    return call


def interleaved(calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Time several functions in turns.

    Args:
        calls: functions of no argument by name, each called at least once before.
        seconds: for all of them together; at least five turns are taken, or three where a turn is long.

    Returns:
        Seconds a call, one number a turn.

    Example:
        >>> sorted(interleaved({"a": int, "b": float}, 0.0))
        ['a', 'b']
    """
    repeats = {}
    turn = 0.0
    for name, call in calls.items():
        once = _seconds(call, 1)
        if once < _SAMPLE_SECONDS:
            once = min(once, _seconds(call, 10))
        repeats[name] = max(1, math.ceil(_SAMPLE_SECONDS / max(once, 1e-6)))
        turn += repeats[name] * once
    least = 3 if turn > _LONG_SECONDS else 5
    turns = min(max(least, int(seconds / max(turn, 1e-6))), _MOST_SAMPLES)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for _ in range(turns):
            for name, call in calls.items():
                samples[name].append(_seconds(call, repeats[name]))
    finally:
        gc.enable()
    return samples


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _memory(cases: ModuleType, cell: Cell, job: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    name, device = job["names"][0], job["device"]
    reason = too_large(name, cell, _available())
    if reason:
        return {name: {"status": "skipped", "reason": reason}}
    tiny = Problem.of(dataclasses.replace(cell, side=8), dtype=job["dtype"])
    problem = Problem.of(cell, dtype=job["dtype"])
    try:
        cases.build(name, tiny).run(cases.array(tiny.weight, job["dtype"]))
        step = cases.build(name, problem)
        weight = cases.array(problem.checked_weight, job["dtype"])
        step.compile()
        answers, seconds = [], 0.0

        def call() -> None:
            nonlocal seconds
            start = time.perf_counter()
            answers.append(step.run(weight))
            cases.synchronize()
            seconds = time.perf_counter() - start

        peak = _peak_of(call) if device.startswith("cpu") else cases.peak_memory(call, device)
        (answer,) = answers
    except Exception as error:
        return {name: _excuse(name, error)}
    return {
        name: _checked(problem, name, step, answer) | {"peak_bytes": peak, "single_call_seconds": seconds}
    }


def _peak_of(call: Callable[[], None]) -> int:
    """Bytes by which the resident memory rises."""
    before = _reset_peak()
    call()
    return max(0, _peak() - before)


def _checked(problem: Problem, name: str, step: Step, answer: Any) -> dict[str, Any]:
    """Status "ok" with the worst error in noise floors, or "wrong" with every quantity that is."""
    verdicts = problem.check(name, step.to_numpy(answer))
    wrong = [verdict.message for verdict in verdicts if not verdict.passed]
    if wrong:
        return {"status": "wrong", "reason": "; ".join(wrong)}
    return {"status": "ok", "noise_floors": max(verdict.ratio for verdict in verdicts)}


def _excuse(name: str, error: Exception) -> dict[str, Any]:
    """An exception of somebody else's code is an answer, one of ours is a failure."""
    if isinstance(error, RefusedError):
        return {"status": "refused", "reason": str(error)}
    first_line = f"{type(error).__name__}: {error}".partition("\n")[0]
    return {"status": "failed" if name in (OURS, "dense", *CEILINGS) else "refused", "reason": first_line}


def _available() -> int | None:
    """Bytes of memory that could be had without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def _reset_peak() -> int:
    """Make the present the peak, as far as the system can; the bytes that are resident now."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return _peak()
    return pages * os.sysconf("SC_PAGE_SIZE")


def _peak() -> int:
    """The largest resident size so far, or since `_reset_peak`, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main(*sys.argv[1:])
