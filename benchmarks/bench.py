"""Time and peak memory of the library and of other implementations of the same function.

    python -m benchmarks.bench [--quick | --toy] [--framework torch,jax,tensorflow] [--group sizes,…] [--against PATH]
                               [--device cuda] [--out DIR]

Run it from the root of the repository, on a machine that does nothing else. Cells of a row share a process, and of each cell
all implementations take turns there. All answers are compared with float64. Each peak of memory has its own process
(`measure.py`). The table in `cells.py` lists the measurements, and the page compares them with `targets.py`. Without
`--device`, the accelerators of the machine are hidden, and the numbers are those of its CPU. With a device there are
different cells, float32 has full precision, and no target is compared.

With `--against`, nothing is compared with other implementations. Instead, ours is measured in turns with that of another
checkout, such as the last release: `git worktree add ../before v0.1.0`.

Exit code 0: everything that was started gave right answers. 1: something gave a wrong answer or failed (a missed target is
not a failure). 2: a wrong option. 3: a requested framework is not installed or does not find the device.
"""

import argparse
import datetime as dt
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.against import compared
from benchmarks.cells import FRAMEWORKS, GROUPS, MODES, REQUIRES, Cell, Row
from benchmarks.plots import plot
from benchmarks.processes import ROOT, Record, Setting, measured
from benchmarks.report import markdown
from benchmarks.results import file_stem, machine, merge, write_bytes, write_text
from benchmarks.targets import evaluate
from selfattn_core.conformance.execution.devices import (
    WORDS,
    DeviceAbsentError,
    chosen,
    device_problem,
    device_variables,
)
from selfattn_core.conformance.execution.visible_devices import seen
from selfattn_core.installed import missing_modules

__all__ = ["main"]

_SOURCES = ("selfattn_core", "backends", "benchmarks/*.py")

# What decides about threads, memory and instructions.
_NOTED = ("MALLOC_", "XLA_FLAGS", "ONEDNN_", "DNNL_", "TF_ENABLE_ONEDNN_OPTS", "MKL_", "ATEN_CPU_CAPABILITY")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write JSON, page and plots.

    Args:
        arguments: arguments of the command line. None means those of the process.

    Returns:
        The exit code.
    """
    options = _options(arguments)
    missing = {name: missing_modules(REQUIRES[name]) for name in options.frameworks}
    absent = [
        f"{', '.join(modules)} (pip install 'selfattn[all]')" for modules in missing.values() if modules
    ]
    if absent:
        print("not installed: " + "; ".join(absent), file=sys.stderr)
        return 3
    about, devices = machine(), {}
    if options.device is not None:
        if wrong := [
            f"{name}: {problem}"
            for name in options.frameworks
            if (problem := device_problem(options.device, WORDS[name]))
        ]:
            print("; ".join(wrong), file=sys.stderr)
            return 2
        for name in options.frameworks:
            try:
                kinds = seen(name, device_variables(name, options.device, os.environ))["kinds"]
                devices[name] = chosen(options.device, kinds)
            except (DeviceAbsentError, RuntimeError) as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 3
        about["device"] = options.device
    status, results = 0, None
    for framework in options.frameworks:
        setting = Setting(framework, devices.get(framework), options.mode.seconds)
        for group in options.groups:
            run = _measure(setting, group, options.mode.groups.get(group, ()), options.against)
            if not run["cells"]:
                continue
            status = max(status, _status(run))
            about |= {"device_model": run["device"]["model"]} if options.device and "device" in run else {}
            results = merge(options.out, about, options.mode.name, run)
            _write(results, options.out)
    for finding in evaluate(results) if results else ():
        if finding.value is not None:
            print(f"{finding.verdict:7} {finding.target.framework:11} {finding}: {finding.target.row}")
    return status


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench",
        description="Time and memory on this CPU.",
        epilog="",
    )
    modes = parser.add_mutually_exclusive_group()
    for name, meaning in (
        ("quick", "few cells, for a first look"),
        ("toy", "tiny sizes, to check that it runs"),
    ):
        modes.add_argument(
            f"--{name}",
            dest="mode",
            action="store_const",
            const=MODES[name],
            default=MODES["full"],
            help=meaning,
        )
    kept = "the latest results of the others on this machine are kept"
    parser.add_argument(
        "--framework",
        dest="frameworks",
        type=_some_of(FRAMEWORKS),
        default=FRAMEWORKS,
        metavar="NAMES",
        help=f"some of {','.join(FRAMEWORKS)}; {kept}",
    )
    parser.add_argument(
        "--group",
        dest="groups",
        type=_some_of(tuple(GROUPS)),
        default=tuple(GROUPS),
        metavar="NAMES",
        help=f"some of the groups of cells; {kept}. " + "; ".join(f"{n}: {w}" for n, w in GROUPS.items()),
    )
    parser.add_argument(
        "--against",
        type=_checkout,
        metavar="PATH",
        help="root of another checkout: measure our implementation of both in turns, and nothing else",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "results",
        metavar="DIR",
        help="folder of the results",
    )
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        help="device as the framework names it, such as cuda:1 (default: the CPU)",
    )
    options = parser.parse_args(arguments)
    if options.device and options.mode.name in ("full", "quick"):
        options.mode = MODES["device" if options.mode.name == "full" else "device-quick"]
    return options


def _some_of(known: tuple[str, ...]) -> Any:
    def names(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        strangers = [name for name in found if name not in known]
        if strangers:
            raise argparse.ArgumentTypeError(f"no {', '.join(strangers)}; there are {', '.join(known)}")
        return found

    return names


def _checkout(text: str) -> Path:
    path = Path(text).resolve()
    if not (path / "backends" / "selfattn_ops").is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no checkout of this repository")
    return path


def _measure(setting: Setting, group: str, rows: Sequence[Row], other: Path | None) -> dict[str, Any]:
    """Measure the cells of one group in one framework."""
    start = time.perf_counter()
    run: dict[str, Any] = {
        "framework": setting.framework,
        "group": group,
        "against": _commit(other) if other else None,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "commit": _commit(ROOT),
        "load_before": os.getloadavg()[0],
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.endswith("_NUM_THREADS") or name.startswith(_NOTED)
        },
        "versions": {},
        "threads": {},
        "cells": [],
    }
    for row in rows:
        for cell, about, found in compared(setting, row, other) if other else _with_peers(setting, row):
            run |= {key: value for key, value in about.items() if key != "build"}
            for record in found.values():
                record.pop("samples", None)
            run["cells"].append(cell.key | {"results": found})
            place = "" if setting.device is None else f" {setting.device}"
            print(f"{setting.framework}{place} {group} {_line(cell, found)}", flush=True)
    return run | {"seconds": time.perf_counter() - start}


def _with_peers(setting: Setting, row: Row) -> Iterator[tuple[Cell, dict[str, Any], dict[str, Record]]]:
    """Times of a row in one process, and every peak of memory in its own."""
    device = setting.device or "cpu"
    if row[0].measure == "time":
        (found,) = measured(setting, row, lambda cell: cell.implementations(setting.framework, device))
        yield from ((cell, *each) for cell, each in zip(row, found, strict=True))
        return
    for cell in row:
        about: dict[str, Any] = {}
        records: dict[str, Record] = {}
        for name in cell.implementations(setting.framework, device):
            (((one, each),),) = measured(setting, (cell,), lambda _, name=name: (name,))
            about, records = one or about, records | each
        yield cell, about, records


def _line(cell: Cell, found: dict[str, Record]) -> str:
    values = []
    for name, record in found.items():
        if "peak_bytes" in record:
            values.append(f"{name} {record['peak_bytes'] / 2**20:.0f} MiB")
        elif "seconds" in record:
            values.append(f"{name} {record['seconds']['median'] * 1e3:.3g} ms")
        elif record["status"] in ("wrong", "failed"):
            values.append(f"{name} {record['status'].upper()} ({record['reason']})")
        else:
            values.append(f"{name} {record['status']}")
        if "of_before" in record:
            values[-1] += f" ({record['of_before']:.3f} × before)"
    return f"{cell.measure} {cell}: {', '.join(values)}"


def _status(run: dict[str, Any]) -> int:
    statuses = {record["status"] for cell in run["cells"] for record in cell["results"].values()}
    return int(bool(statuses & {"wrong", "failed"}))


def _commit(checkout: Path) -> str:
    """The commit of a checkout, with a + if the sources differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=checkout, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *_SOURCES)
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _write(results: dict[str, Any], folder: Path) -> None:
    """Write the JSON file first, because a failing plot must not lose the measurements."""
    newest = max(run["date"] for run in results["runs"])
    stem = file_stem(results["machine"], results["mode"], newest)
    write_text(folder / f"{stem}.json", json.dumps(results, indent=1) + "\n")
    plots = {"Time against N": f"{stem}-time.png", "Peak memory against N": f"{stem}-memory.png"}
    for quantity, file in zip(("time", "memory"), plots.values(), strict=True):
        write_bytes(folder / file, plot(results, quantity))
    write_text(folder / f"{stem}.md", markdown(results, plots))


if __name__ == "__main__":
    sys.exit(main())
