"""Time and peak memory of the library and of other implementations of the same function.

    python -m benchmarks.bench [--quick | --toy] [--framework torch,jax,tensorflow] [--device cuda] [--out DIR]

Run it from the root of the repository, on a machine that does nothing else. Each timing cell runs in its own process. All
implementations are first compared with float64 there, and then take turns. Each peak of memory has its own process too
(`measure.py`). The table in `cells.py` lists the measurements, and the page compares them with `targets.py`. Without
`--device`, the accelerators of the machine are hidden, and the numbers are those of its CPU. With a device there are
different cells, float32 has full precision, the core is measured in bfloat16 too, and no target is compared.

Exit code 0: everything that was started gave right answers. 1: something gave a wrong answer or failed (a missed target is
not a failure). 2: a wrong option. 3: a requested framework is not installed or does not find the device.
"""

import argparse
import dataclasses
import datetime as dt
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import FRAMEWORKS, MODES, REQUIRES, Cell, Mode
from benchmarks.report import markdown, plot
from benchmarks.results import file_stem, machine, merge, write_bytes, write_text
from benchmarks.targets import evaluate
from selfattn_core.conformance.execution.devices import (
    WORDS,
    DeviceAbsentError,
    chosen,
    device_problem,
    device_variables,
)
from selfattn_core.conformance.execution.environment import shared_accelerator
from selfattn_core.conformance.execution.visible_devices import seen
from selfattn_core.installed import missing_modules

__all__ = ["main"]

_ROOT = Path(__file__).parents[1]
_LONGEST_SECONDS = 900


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
    status = 0
    for framework in options.frameworks:
        for dtype in ("float32", "bfloat16") if options.device else ("float32",):
            run = _measure(
                framework, options.mode, devices.get(framework, "cpu:0"), dtype, hidden=not options.device
            )
            status = max(status, _status(run))
            about |= {"device_model": run["device"]["model"]} if options.device and "device" in run else {}
            label = framework if dtype == "float32" else f"{framework} in {dtype}"
            results = merge(options.out, about, options.mode.name, {label: run})
            _write(results, options.out)
    for finding in evaluate(results):
        if finding.value is not None:
            print(f"{finding.verdict:7} {finding.target.framework:11} {finding}: {finding.target.row}")
    return status


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench", description="Time and memory on this CPU."
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
    parser.add_argument(
        "--framework",
        dest="frameworks",
        type=_frameworks,
        default=FRAMEWORKS,
        metavar="NAMES",
        help=f"some of {','.join(FRAMEWORKS)}; the latest results of the others on this machine are kept",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=_ROOT / "benchmarks" / "results",
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


def _frameworks(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    strangers = [name for name in names if name not in FRAMEWORKS]
    if strangers:
        raise argparse.ArgumentTypeError(f"no {', '.join(strangers)}; there are {', '.join(FRAMEWORKS)}")
    return names


def _measure(framework: str, mode: Mode, device: str, dtype: str, *, hidden: bool) -> dict[str, Any]:
    """Run all cells of one framework, one process after the other. In bfloat16, only those of the core."""
    start = time.perf_counter()
    cells = [cell for cell in mode.cells if dtype == "float32" or cell.level == "core"]
    run: dict[str, Any] = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "commit": _commit(),
        "load_before": os.getloadavg()[0],
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.endswith("_NUM_THREADS") or name.startswith(("MALLOC_", "XLA_FLAGS"))
        },
        "versions": {},
        "threads": {},
        "cells": [],
    }
    job = {"framework": framework, "seconds": mode.seconds, "device": device, "dtype": dtype}
    for number, cell in enumerate(cells, 1):
        found: dict[str, Any] = {}
        for names in _processes(cell, framework, device):
            answer = _process(job | {"names": names}, cell, hidden=hidden)
            found |= answer["records"]
            run |= answer.get("about", {})
        run["cells"].append(_named(cell) | {"results": found})
        where = "" if hidden else f" {device} {dtype}"
        print(f"{framework}{where} {number}/{len(cells)} {_line(cell, found)}", flush=True)
    return run | {"seconds": time.perf_counter() - start}


def _processes(cell: Cell, framework: str, device: str) -> Iterator[tuple[str, ...]]:
    """The groups of implementations that share a process: all for time, single ones for memory."""
    names = cell.implementations(framework, device)
    if cell.measure == "time":
        yield names
    else:
        for name in names:
            yield (name,)


def _process(job: dict[str, Any], cell: Cell, *, hidden: bool) -> dict[str, Any]:
    """Run one job. If its process dies or hangs, all its implementations have failed."""
    with tempfile.TemporaryDirectory() as folder:
        job_file, result_file = Path(folder) / "job.json", Path(folder) / "result.json"
        job_file.write_text(json.dumps(job | {"cell": dataclasses.asdict(cell)}), encoding="utf-8")
        quiet: dict[str, str | None] = {"TF_CPP_MIN_LOG_LEVEL": "3"}
        if hidden:
            quiet |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
        else:
            quiet |= device_variables(job["framework"], job["device"], os.environ)
            # Full precision, because every answer is checked. Memory on demand, because counters would show reserved memory.
            quiet |= {
                "NVIDIA_TF32_OVERRIDE": "0",
                "JAX_DEFAULT_MATMUL_PRECISION": "highest",
                **shared_accelerator(),
            }
        try:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.measure", str(job_file), str(result_file)],
                cwd=_ROOT,
                env={name: value for name, value in (os.environ | quiet).items() if value is not None},
                capture_output=True,
                text=True,
                timeout=_LONGEST_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            reason = f"not done after {_LONGEST_SECONDS} s"
        else:
            if done.returncode == 0:
                answer: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
                return answer
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            reason = f"exit code {done.returncode}: {last}"
    return {"records": {name: {"status": "failed", "reason": reason} for name in job["names"]}}


def _named(cell: Cell) -> dict[str, Any]:
    return {key: getattr(cell, key) for key in ("measure", "level", "step", "channels", "side")}


def _line(cell: Cell, found: dict[str, Any]) -> str:
    where = f"{cell.measure} {cell.level} {cell.step} C={cell.channels} {cell.side}×{cell.side}:"
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
    return f"{where} {', '.join(values)}"


def _status(run: dict[str, Any]) -> int:
    statuses = {record["status"] for cell in run["cells"] for record in cell["results"].values()}
    return int(bool(statuses & {"wrong", "failed"}))


def _commit() -> str:
    """The current commit, with a + if the sources differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git(
            "status",
            "--porcelain",
            "--untracked-files=no",
            "--",
            "selfattn_core",
            "backends",
            "benchmarks/*.py",
        )
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _write(results: dict[str, Any], folder: Path) -> None:
    """Write the JSON file first, because a failing plot must not lose the measurements."""
    newest = max(run["date"] for run in results["frameworks"].values())
    stem = file_stem(results["machine"], results["mode"], newest)
    write_text(folder / f"{stem}.json", json.dumps(results, indent=1) + "\n")
    plots = {"Time against N": f"{stem}-time.png", "Peak memory against N": f"{stem}-memory.png"}
    for quantity, file in zip(("time", "memory"), plots.values(), strict=True):
        write_bytes(folder / file, plot(results, quantity))
    write_text(folder / f"{stem}.md", markdown(results, plots))


if __name__ == "__main__":
    sys.exit(main())
