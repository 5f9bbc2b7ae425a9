"""The processes that measure, one for each build, and the judgement of their answers."""

import contextlib
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.answers import Answers
from benchmarks.cells import ACCOUNTABLE, OURS, Cell
from benchmarks.inputs import draw
from selfattn_core.conformance.execution.devices import device_variables
from selfattn_core.conformance.execution.environment import shared_accelerator
from selfattn_core.conformance.verdicts.tolerance import FACTOR

__all__ = ["ROOT", "Setting", "judge_record", "measured"]

ROOT = Path(__file__).resolve().parents[1]

_LONGEST_SECONDS = 900
_WARM_UP_SIDE = 8

# Code of others may round more than the kit allows (flex_attention approximates exp). A wrong formula is further off.
_COARSE_FLOORS = 10 * FACTOR

Record = dict[str, Any]
Found = tuple[dict[str, Any], dict[str, Record]]


@dataclass(frozen=True)
class Setting:
    """What the cells of a run have in common.

    Args:
        framework: the framework.
        device: the framework's name of the device. None is the CPU, with the accelerators of the machine hidden.
        seconds: time for the repeats of one timing cell.
    """

    framework: str
    device: str | None
    seconds: float

    def variables(self) -> dict[str, str]:
        """The environment of the processes."""
        found: dict[str, str | None] = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        if self.device is None:
            found |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
        else:
            found |= device_variables(self.framework, self.device, os.environ)
            # Full precision, because every answer is checked. Memory on demand, because counters would show reserved memory.
            found |= {"NVIDIA_TF32_OVERRIDE": "0", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
            found |= shared_accelerator()
        return {name: value for name, value in found.items() if value is not None}


def measured(
    setting: Setting,
    cells: Sequence[Cell],
    names: Callable[[Cell], Sequence[str]],
    builds: Sequence[Path] = (ROOT,),
) -> list[list[Found]]:
    """Measure some cells in one process for each build. Two builds take turns in every cell.

    Args:
        setting: what the cells have in common.
        cells: cells of one row. A cell that measures memory is alone.
        names: the implementations of a cell. One that measures memory has one.
        builds: one checkout or two.

    Returns:
        For each build and each cell, what the process says of itself, and the records by implementation. Of an
        implementation whose answer is wrong, no time is reported. If a process dies or hangs, everything that it had not
        finished has failed.
    """
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as pipes:
        folder = Path(name)
        entries = [_entry(cell, names(cell), folder) for cell in cells]
        links = _links(pipes) if len(builds) > 1 else [None]
        processes = [
            _start(setting, build, folder / f"build-{number}", entries, link)
            for number, (build, link) in enumerate(zip(builds, links, strict=True))
        ]
        pipes.close()  # so that the end of one process is seen by the other
        reasons = _ends(processes, folder)
        return [
            _read(folder / f"build-{number}", build, entries, reason)
            for number, (build, reason) in enumerate(zip(builds, reasons, strict=True))
        ]


def _entry(cell: Cell, names: Sequence[str], folder: Path) -> dict[str, Any]:
    """What the job says of a cell. The inputs are written to the folder."""
    contestants: dict[str, Any] = {}
    for name in names:
        implementation, posed = cell.posed(name)
        posed = dataclasses.replace(posed, only=())
        contestants[name] = {
            "implementation": implementation,
            "cell": dataclasses.asdict(posed),
            "inputs": _saved(posed, folder),
        }
        if cell.measure == "memory":
            tiny = dataclasses.replace(posed, side=_WARM_UP_SIDE)
            contestants[name]["warm_up"] = _saved(tiny, folder)
    return {"cell": dataclasses.asdict(cell), "contestants": contestants}


def _saved(cell: Cell, folder: Path) -> str:
    path = folder / f"{abs(hash(cell))}.npz"
    if not path.exists():
        _answers(cell).problem.save(path)
    return str(path)


@functools.lru_cache(maxsize=4)
def _answers(cell: Cell) -> Answers:
    return Answers(draw(cell))


def _links(pipes: contextlib.ExitStack) -> list[dict[str, Any]]:
    """Two pipes that join two processes into a ring."""
    ends = [os.pipe(), os.pipe()]
    for end in (*ends[0], *ends[1]):
        pipes.callback(os.close, end)
    return [
        {"reads": ends[0][0], "writes": ends[1][1], "leads": True},
        {"reads": ends[1][0], "writes": ends[0][1], "leads": False},
    ]


def _start(
    setting: Setting, build: Path, folder: Path, entries: Sequence[Any], link: dict[str, Any] | None
) -> subprocess.Popen[bytes]:
    """Start the process of one build, with this benchmark and the library of the build."""
    shown = folder / "bench"
    shown.mkdir(parents=True)
    (shown / "benchmarks").symlink_to(ROOT / "benchmarks")
    job = {
        "framework": setting.framework,
        "device": setting.device,
        "seconds": setting.seconds,
        "cells": entries,
        "partner": link,
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    variables = setting.variables()
    places = [str(shown), str(build), str(build / "backends"), variables.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    with (folder / "stderr").open("wb") as errors:
        return subprocess.Popen(
            # -P: the folder where the benchmark is started must not come before that of the build.
            [sys.executable, "-P", "-m", "benchmarks.measure", str(folder)],
            cwd=ROOT,
            env=variables,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=(link["reads"], link["writes"]) if link else (),
        )


def _ends(processes: Sequence[subprocess.Popen[bytes]], folder: Path) -> list[str]:
    """Wait for the processes, and return for each why it did not end well, or ""."""
    end = time.monotonic() + _LONGEST_SECONDS
    reasons = []
    try:
        for number, process in enumerate(processes):
            try:
                code = process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                reasons.append(f"not done after {_LONGEST_SECONDS} s")
                continue
            errors = (folder / f"build-{number}" / "stderr").read_text(encoding="utf-8", errors="replace")
            last = (errors.strip().splitlines() or ["no message"])[-1]
            reasons.append(f"exit code {code}: {last}" if code else "")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return reasons


def _read(folder: Path, build: Path, entries: Sequence[Any], reason: str) -> list[Found]:
    """The records of a process, with its answers judged."""
    file = folder / "records.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    found: list[Found] = []
    for line, entry in zip(lines, entries, strict=False):
        answer = json.loads(line)
        about, records = answer["about"], answer["records"]
        if Path(about["build"]) != build.resolve():
            reason = f"the library came from {about['build']}"
            break
        for name, record in records.items():
            judge_record(entry["contestants"][name], record, folder)
        _compare(records)
        found.append((about, records))
    for entry in entries[len(found) :]:
        failed = {"status": "failed", "reason": reason or "no answer"}
        found.append(({}, {name: dict(failed) for name in entry["contestants"]}))
    return found


def judge_record(contestant: Mapping[str, Any], record: Record, folder: Path) -> None:
    """Replace the name of the file of answers by the worst error in noise floors, or by every wrong quantity."""
    file = record.pop("answers", None)
    samples = record.pop("samples", None)
    if file is None:
        return
    given = contestant["cell"]
    cell = Cell(**{**given, "only": tuple(given["only"])})
    with np.load(folder / file) as arrays:
        verdicts = _answers(cell).check(contestant["implementation"], dict(arrays))
    record["noise_floors"] = max(verdict.ratio for verdict in verdicts)
    wrong = [verdict.message for verdict in verdicts if not verdict.passed]
    if wrong:
        foreign = contestant["implementation"] not in ACCOUNTABLE
        coarse = foreign and record["noise_floors"] <= _COARSE_FLOORS
        record |= {"status": "coarse" if coarse else "wrong", "reason": "; ".join(wrong)}
    if record["status"] == "wrong":
        return
    if samples:
        record["samples"] = samples
        record["seconds"] = {
            "min": min(samples),
            "median": statistics.median(samples),
            "max": max(samples),
            "samples": len(samples),
        }


def _compare(records: Mapping[str, Record]) -> None:
    """Add to every time its ratio to ours."""
    ours = records.get(OURS, {}).get("seconds")
    for record in records.values():
        if ours and "seconds" in record:
            record["times_ours"] = record["seconds"]["median"] / ours["median"]
