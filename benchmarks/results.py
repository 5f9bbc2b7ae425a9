"""The file of results: its content and name, and reading, merging and writing it.

    {"schema": 1, "mode": "full", "machine": {"cpu": …, "cores": …, …},
     "frameworks": {"torch": {"date": …, "commit": …, "versions": {…}, "threads": {…}, "load_before": …, "seconds": …,
                              "cells": [{"measure": …, "level": …, "step": …, "channels": …, "side": …,
                                         "results": {"ours": {"status": "ok", …}, …}}, …]}, …}}

Each framework has its own run, so it can be measured again without the others. The "status" of a record is "ok", "refused"
or "skipped" with the "reason", "wrong" (the answer was wrong, so it was not timed) or "failed".
"""

import json
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.cells import OURS
from selfattn_core.files.writing import write_atomically

__all__ = ["SCHEMA", "exponent", "file_stem", "machine", "median", "merge", "peak", "records", "write_text"]

SCHEMA = 1

Results = dict[str, Any]


def machine() -> dict[str, Any]:
    """The properties of the machine that determine times: processor, usable cores, memory, system."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "architecture": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def file_stem(about: Mapping[str, Any], mode: str, date: str) -> str:
    """The name from machine or device, date and, unless the run is full, mode.

    Example:
        >>> file_stem({"cpu": "AMD EPYC (TM) 9", "cores": 2}, "toy", "2030-01-31")
        'amd-epyc-9-2-cores-2030-01-31-toy'
    """
    cpu = re.sub(r"\((tm|r|c)\)|\bcpu\b|@.*", "", str(about["cpu"]).lower())
    place = f"{cpu}-{about['cores']}-cores"
    if "device" in about:
        place = f"{about.get('device_model', cpu)}-{about['device']}".lower()
    slug = re.sub(r"[^a-z0-9]+", "-", f"{place}-{date}").strip("-")
    return slug if mode in ("full", "device") else f"{slug}-{mode}"


def merge(folder: Path, about: Mapping[str, Any], mode: str, new: Mapping[str, Any]) -> Results:
    """Merge new results of some frameworks with the latest results of the others in the folder.

    Args:
        folder: folder of result files. Only files of this machine and mode are used.
        about: `machine()`.
        mode: name of the mode.
        new: the entries of "frameworks" that were measured now.
    """
    merged: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        same = ("cpu", "cores", "device", "device_model")
        if found.get("schema") != SCHEMA or found["mode"] != mode:
            continue
        if any(found["machine"].get(key) != about.get(key) for key in same):
            continue
        for framework, run in found["frameworks"].items():
            if framework not in merged or run["date"] >= merged[framework]["date"]:
                merged[framework] = run
    return {
        "schema": SCHEMA,
        "mode": mode,
        "machine": dict(about),
        "frameworks": {**merged, **new},
    }


def write_text(path: Path, text: str) -> None:
    """Write beside the target and rename, so that the file is always complete."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content, overwrite=True)


def records(
    results: Mapping[str, Any],
    framework: str,
    measure: str,
    level: str,
    step: str,
    channels: int,
) -> dict[int, dict[str, Any]]:
    """The records of all implementations, by side of the map."""
    run = results["frameworks"].get(framework, {"cells": []})
    wanted = (measure, level, step, channels)
    keys = ("measure", "level", "step", "channels")
    return {
        cell["side"]: cell["results"] for cell in run["cells"] if tuple(cell[key] for key in keys) == wanted
    }


def median(
    results: Mapping[str, Any],
    framework: str,
    step: str,
    channels: int,
    side: int,
    name: str = OURS,
    level: str = "core",
) -> float | None:
    """The median seconds of an implementation, or None without a measurement."""
    record = records(results, framework, "time", level, step, channels).get(side, {}).get(name, {})
    return record["seconds"]["median"] if "seconds" in record else None


def peak(
    results: Mapping[str, Any], framework: str, step: str, channels: int, side: int, name: str = OURS
) -> int | None:
    """The peak bytes of the core above its inputs, or None without a measurement."""
    record = records(results, framework, "memory", "core", step, channels).get(side, {}).get(name, {})
    return record.get("peak_bytes")


def exponent(points: Iterable[tuple[float, float]]) -> float | None:
    """The p of the best power law y = c·xᵖ (least squares of the logarithms), or None for fewer than two points.

    Example:
        >>> exponent([(1, 3), (10, 300)])
        2.0
    """
    logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    if len({x for x, _ in logs}) < 2:
        return None
    mean_x = sum(x for x, _ in logs) / len(logs)
    mean_y = sum(y for _, y in logs) / len(logs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)
    return round(slope, 3)
