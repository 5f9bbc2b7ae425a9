"""One job in a separate process: check an answer, then measure its time or its peak memory.

Started by `bench.py` as `python -m benchmarks.measure JOB.json RESULT.json`.

Time. Every implementation of the cell is built and checked first. Those that pass take turns, A B A B …, so that other
activity of the machine affects all of them. A sample is the mean of all calls in 10 ms. The first calls are not counted, and
Python's garbage collector is off.

Memory. The implementation has its own process. First a tiny problem warms up the library (thread pools, compilers), and the
real inputs and the compiled step are made. Then the high-water mark of the resident memory is reset, the step runs once,
and the result is the peak minus the resident memory before. Outputs count. The allocator is that of the system with its
defaults, as users have it. glibc keeps freed blocks below its (moving) mmap threshold, so the peak includes fragmentation.
Memory kept from before is released first (malloc_trim), because it would hide the first megabytes. Without /proc the mark
cannot be reset, and a step that stays below an earlier peak is not visible. On a device other than the CPU, the framework's
own counters give the peak.
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
    """Run the job that one file describes, and write the result to the other."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    cell = Cell(**job["cell"])
    cases = importlib.import_module(f"benchmarks.{job['framework']}_cases")
    with cases.on(job["device"]) as device:
        records = _memory(cases, cell, job) if cell.measure == "memory" else _time(cases, cell, job)
        about = cases.about() | {"device": {"name": job["device"], **device}}
    Path(result_file).write_text(json.dumps({"about": about, "records": records}), encoding="utf-8")


def _time(cases: ModuleType, cell: Cell, job: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    problem = Problem.of(cell, dtype=job["dtype"])
    # In the dtype of the step, so that no cast is timed.
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
        calls: functions without arguments by name, each called at least once before.
        seconds: time for all of them together. There are at least five turns, or three if a turn is long.

    Returns:
        Seconds for each call, one number for each turn.

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
    """The bytes by which a call raises the resident memory."""
    before = _reset_peak()
    call()
    return max(0, _peak() - before)


def _checked(problem: Problem, name: str, step: Step, answer: Any) -> dict[str, Any]:
    """The status "ok" with the worst error in noise floors, or "wrong" with every wrong quantity."""
    verdicts = problem.check(name, step.to_numpy(answer))
    wrong = [verdict.message for verdict in verdicts if not verdict.passed]
    if wrong:
        return {"status": "wrong", "reason": "; ".join(wrong)}
    return {"status": "ok", "noise_floors": max(verdict.ratio for verdict in verdicts)}


def _excuse(name: str, error: Exception) -> dict[str, Any]:
    """The record of an exception. In code of others it is a result, in ours a failure."""
    if isinstance(error, RefusedError):
        return {"status": "refused", "reason": str(error)}
    first_line = f"{type(error).__name__}: {error}".partition("\n")[0]
    return {"status": "failed" if name in (OURS, "dense", *CEILINGS) else "refused", "reason": first_line}


def _available() -> int | None:
    """Bytes of memory that are available without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def _reset_peak() -> int:
    """Reset the peak to the current memory, if the system can, and return the resident bytes."""
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
