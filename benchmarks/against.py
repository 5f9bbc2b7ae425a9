"""This build and another in turns."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.cells import OURS, Cell, Row
from benchmarks.processes import ROOT, Record, Setting, measured

__all__ = ["compared"]

_REPEATS = 3
_LONG_SECONDS = 5.0


def compared(setting: Setting, row: Row, other: Path) -> list[tuple[Cell, dict[str, Any], dict[str, Record]]]:
    """Measure our implementation of this build and of another checkout.

    Of each build there is one process that times, with nothing but ours in it. The two take turns. The peaks of memory are
    the medians of three processes each, or those of one where a call takes long.

    Args:
        setting: what the cells have in common.
        row: the cells of one row.
        other: root of the other checkout.

    Returns:
        For each cell what the process of this build says of itself, and the records "now" and "before". The record "now"
        has the ratio of the medians, and in timing cells the quartiles of the ratios of the single turns.
    """
    builds = (ROOT, other)
    row = tuple(cell for cell in row if not cell.only or OURS in cell.only)
    if row and row[0].measure == "memory":
        return [_weighed(setting, cell, builds) for cell in row]
    now, before = measured(setting, row, lambda _: (OURS,), builds)
    found = []
    for cell, (about, mine), (_, theirs) in zip(row, now, before, strict=True):
        records = {"now": mine[OURS], "before": theirs[OURS]}
        if all("seconds" in record for record in records.values()):
            pairs = zip(records["now"]["samples"], records["before"]["samples"], strict=True)
            lower, _, upper = statistics.quantiles((one / two for one, two in pairs), n=4)
            records["now"] |= {"of_before": _ratio(records, _median), "quartiles": [lower, upper]}
        found.append((cell, about, records))
    return found


def _weighed(
    setting: Setting, cell: Cell, builds: tuple[Path, Path]
) -> tuple[Cell, dict[str, Any], dict[str, Record]]:
    peaks: dict[str, list[int]] = {"now": [], "before": []}
    records: dict[str, Record] = {}
    about: dict[str, Any] = {}
    for _ in range(_REPEATS):
        for name, build in zip(peaks, builds, strict=True):
            ((one, found),) = measured(setting, (cell,), lambda _: (OURS,), (build,))[0]
            about = one or about
            records[name] = found[OURS]
            if "peak_bytes" not in records[name]:
                return cell, about, records
            peaks[name].append(records[name]["peak_bytes"])
            records[name] |= {"peak_bytes": statistics.median(peaks[name]), "peaks": list(peaks[name])}
        if max(record["single_call_seconds"] for record in records.values()) > _LONG_SECONDS:
            break
    if records["before"]["peak_bytes"]:
        records["now"]["of_before"] = _ratio(records, lambda record: record["peak_bytes"])
    return cell, about, records


def _median(record: Mapping[str, Any]) -> float:
    return float(record["seconds"]["median"])


def _ratio(records: Mapping[str, Record], quantity: Any) -> float:
    return float(quantity(records["now"]) / quantity(records["before"]))
