"""One job in a separate process: compute the answers of some cells, and measure their time or their peak memory.

Started by `processes.py` as `python -m benchmarks.measure FOLDER`. The folder has `job.json` and the inputs. It receives the
answers, which `processes.py` judges, and a line of `records.jsonl` for every cell that is done.

Time. Every implementation of the cell is built, and its answer is written. Then they take turns, A B A B …, so that other
activity of the machine affects all of them. A sample is the mean of all calls in 10 ms. The first call of a turn is
not counted, and Python's garbage collector is off.

Memory. The implementation has its own process. First a tiny problem warms up the library (thread pools, compilers), and the
real inputs and the compiled step are made. Then the high-water mark of the resident memory is reset, the step runs once,
and the result is the peak minus the resident memory before. Outputs count. The allocator is that of the system with its
defaults, as users have it. glibc keeps freed blocks below its (moving) mmap threshold, so the peak includes fragmentation.
Memory kept from before is released first (malloc_trim), because it would hide the first megabytes. Without /proc the mark
cannot be reset, and a step that stays below an earlier peak is not visible. On a device other than the CPU, the framework's
own counters give the peak.

Nothing here is imported from the library but the operators and layers under measurement and what they need, because the
library may be another build (`bench.py --against`).
"""

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.cells import ACCOUNTABLE, Cell, too_large
from benchmarks.problem import Problem
from benchmarks.step import RefusedError, Step
from benchmarks.turns import Partner, interleaved

__all__ = ["main"]

Record = dict[str, Any]


def main(folder: str) -> None:
    """Run the job that a folder describes."""
    job = json.loads((Path(folder) / "job.json").read_text(encoding="utf-8"))
    cases = importlib.import_module(f"benchmarks.{job['framework']}_cases")
    partner = Partner(**job["partner"]) if job["partner"] else None
    with cases.on(job["device"]) if job["device"] else contextlib.nullcontext({}) as device:
        about = cases.about() | {"build": _build(), "device": {"name": job["device"], **device}}
        with (Path(folder) / "records.jsonl").open("w", encoding="utf-8") as file:
            for number, entry in enumerate(job["cells"]):
                given = _Given(Cell(**entry["cell"]), entry["contestants"], Path(folder), number)
                if given.cell.measure == "memory":
                    records = _memory(cases, given, job["device"])
                else:
                    records = _time(cases, given, job["seconds"], partner)
                file.write(json.dumps({"about": about, "records": records}) + "\n")
                file.flush()


class _Given:
    """One cell of a job: its implementations, and the files of its inputs and answers."""

    def __init__(self, cell: Cell, contestants: Mapping[str, Any], folder: Path, number: int) -> None:
        self.cell, self.names, self._contestants = cell, list(contestants), contestants
        self._folder, self._number = folder, number

    def posed(self, name: str, which: str = "inputs") -> tuple[str, Problem]:
        """The implementation and the problem behind a name."""
        entry = self._contestants[name]
        return entry["implementation"], Problem.load(Cell(**entry["cell"]), self._folder / entry[which])

    def keep(self, name: str, step: Step, answer: Any) -> Record:
        """Write the answer of an implementation to a file, and return the record that names it."""
        file = f"answers-{self._number}-{self.names.index(name)}.npz"
        np.savez(self._folder / file, **step.to_numpy(answer))
        return {"status": "ok", "answers": file}


def _build() -> str:
    """The checkout from which the operators come."""
    found = importlib.util.find_spec("selfattn_ops")
    return str(Path(str(found and found.origin)).resolve().parents[2])


def _time(cases: ModuleType, given: _Given, seconds: float, partner: Partner | None) -> dict[str, Record]:
    cases.forget()  # what the cell before has compiled
    records: dict[str, Record] = {}
    calls: dict[str, Callable[[], None]] = {}
    for name in given.names:
        implementation, problem = given.posed(name)
        reason = too_large(implementation, problem.cell, _available())
        if reason:
            records[name] = {"status": "skipped", "reason": reason}
            continue
        # In the dtype of the step, so that no cast is timed.
        weight, checked_weight = (
            cases.array(values, problem.cell.dtype) for values in (problem.weight, problem.checked_weight)
        )
        try:
            step = cases.build(implementation, problem)
            start = time.perf_counter()
            answer = step.run(checked_weight)
            cases.synchronize()
            first = time.perf_counter() - start
        except Exception as error:
            records[name] = _excuse(implementation, error)
            continue
        records[name] = given.keep(name, step, answer) | {"first_call_seconds": first}
        del answer
        calls[name] = _call(cases, step, weight)
    if partner is None or partner.agree(bool(calls)):
        for name, samples in interleaved(calls, seconds, partner).items():
            records[name]["samples"] = samples
    return records


def _call(cases: ModuleType, step: Step, weight: Any) -> Callable[[], None]:
    def call() -> None:
        step.run(weight)
        cases.synchronize()

    return call


def _memory(cases: ModuleType, given: _Given, device: str | None) -> dict[str, Record]:
    (name,) = given.names
    implementation, problem = given.posed(name)
    reason = too_large(implementation, problem.cell, _available())
    if reason:
        return {name: {"status": "skipped", "reason": reason}}
    _, tiny = given.posed(name, "warm_up")
    try:
        cases.build(implementation, tiny).run(cases.array(tiny.weight, tiny.cell.dtype))
        step = cases.build(implementation, problem)
        weight = cases.array(problem.checked_weight, problem.cell.dtype)
        step.compile()
        answers, seconds = [], 0.0

        def call() -> None:
            nonlocal seconds
            start = time.perf_counter()
            answers.append(step.run(weight))
            cases.synchronize()
            seconds = time.perf_counter() - start

        on_host = device is None or device.startswith("cpu")
        peak = _peak_of(call) if on_host else cases.peak_memory(call, device)
        (answer,) = answers
    except Exception as error:
        return {name: _excuse(implementation, error)}
    return {name: given.keep(name, step, answer) | {"peak_bytes": peak, "single_call_seconds": seconds}}


def _peak_of(call: Callable[[], None]) -> int:
    """The bytes by which a call raises the resident memory."""
    before = _reset_peak()
    call()
    return max(0, _peak() - before)


def _excuse(name: str, error: Exception) -> Record:
    """The record of an exception. In code of others it is a result, in ours a failure."""
    if isinstance(error, RefusedError):
        return {"status": "refused", "reason": str(error)}
    first_line = f"{type(error).__name__}: {error}".partition("\n")[0]
    return {"status": "failed" if name in ACCOUNTABLE else "refused", "reason": first_line}


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
