"""The file of results: its content and name, and reading, merging and writing it.

    {"schema": 2, "mode": "full", "machine": {"cpu": …, "cores": …, "instructions": [...], …},
     "runs": [{"framework": "torch", "group": "sizes", "against": null, "date": …, "commit": …, "versions": {…},
               "threads": {…}, "load_before": …, "seconds": …,
               "cells": [{"measure": …, "level": …, "step": …, "channels": …, "side": …, "batch": …, "dtype": …,
                          "logits": …, "results": {"ours": {"status": "ok", …}, …}}, …]}, …]}

Every group of cells has its own run in each framework, so it can be measured again without the others. The "status" of a
record is "ok", "refused" or "skipped" with the "reason", "coarse" (code of others that rounds more than the kit allows),
"wrong" (the answer was wrong, so no time is reported) or "failed".
In a run against another checkout, "against" is its commit, and the records are "now" and "before".
"""

import json
import math
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.cells import FRAMEWORKS, GROUPS, OURS, Cell
from selfattn_core.files.writing import write_atomically

__all__ = [
    "SCHEMA",
    "cells",
    "exponent",
    "file_stem",
    "frameworks",
    "instructions",
    "machine",
    "median",
    "merge",
    "peak",
    "write_bytes",
    "write_text",
]

SCHEMA = 2

INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_fp16": "AVX-512 FP16",
    "amx_bf16": "AMX BF16",
    "amx_fp16": "AMX FP16",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "BF16",
    "sme": "SME",
}
"""The flags of /proc/cpuinfo that say how fast products can be, on x86 and on ARM."""

Results = dict[str, Any]


def machine() -> dict[str, Any]:
    """The properties of the machine that determine times: processor, usable cores, memory, system."""
    return {
        "cpu": _cpu_name(),
        "instructions": instructions(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "architecture": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def instructions(file: Path = Path("/proc/cpuinfo")) -> list[str] | None:
    """The instructions for products that Linux lists for this processor. None without such a list."""
    flags = _cpuinfo("flags", file) or _cpuinfo("Features", file)
    return [word for flag, word in INSTRUCTIONS.items() if flag in flags.split()] if flags else None


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str, file: Path = Path("/proc/cpuinfo")) -> str:
    """A field of the first processor, or ""."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    found = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in found if name.strip() == field), "")


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
    """Merge a new run with the latest runs of other groups and frameworks in the folder.

    Args:
        folder: folder of result files. Only files of this machine and mode are used.
        about: `machine()`.
        mode: name of the mode.
        new: the run that was measured now.
    """
    merged: dict[tuple[Any, ...], Any] = {}
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        same = ("cpu", "instructions", "cores", "device", "device_model")
        if found.get("schema") != SCHEMA or found["mode"] != mode:
            continue
        if any(found["machine"].get(key) != about.get(key) for key in same):
            continue
        for run in found["runs"]:
            if run["date"] >= merged.get(_place(run), run)["date"]:
                merged[_place(run)] = run
    merged[_place(new)] = new
    runs = [merged[place] for place in sorted(merged)]
    return {"schema": SCHEMA, "mode": mode, "machine": dict(about), "runs": runs}


def _place(run: Mapping[str, Any]) -> tuple[int, int, bool]:
    """Runs of one place replace each other. The places are in the order of the page."""
    order = FRAMEWORKS.index(run["framework"]), list(GROUPS).index(run["group"])
    return (*order, run["against"] is not None)


def write_text(path: Path, text: str) -> None:
    """Write beside the target and rename, so that the file is always complete."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content, overwrite=True)


def frameworks(results: Mapping[str, Any]) -> list[str]:
    """The frameworks that were measured."""
    return list(dict.fromkeys(run["framework"] for run in results["runs"]))


def cells(
    results: Mapping[str, Any], framework: str, *, against: bool = False, **wanted: Any
) -> Iterator[dict[str, Any]]:
    """The cells of a framework, as the file has them, whose values are the wanted ones.

    Args:
        results: content of a file of results.
        framework: the framework.
        against: whether those that compare with another build are meant, or those that compare with other implementations.
        wanted: values of `Cell.key`, and "group".
    """
    for run in results["runs"]:
        if run["framework"] != framework or (run["against"] is not None) != against:
            continue
        for cell in run["cells"]:
            if all((cell | {"group": run["group"]})[key] == value for key, value in wanted.items()):
                yield cell


def median(results: Mapping[str, Any], framework: str, cell: Cell, name: str = OURS) -> float | None:
    """The median seconds of an implementation, or None without a measurement."""
    found = _record(results, framework, cell, name)
    return found["seconds"]["median"] if "seconds" in found else None


def peak(results: Mapping[str, Any], framework: str, cell: Cell, name: str = OURS) -> int | None:
    """The peak bytes above the inputs, or None without a measurement."""
    return _record(results, framework, cell, name).get("peak_bytes")


def _record(results: Mapping[str, Any], framework: str, cell: Cell, name: str) -> dict[str, Any]:
    found = next(cells(results, framework, **cell.key), {"results": {}})
    record: dict[str, Any] = found["results"].get(name, {})
    return record


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
