"""All checks of a device in one run: conformance, times and memory, and a short training.

    python -m benchmarks.device_check --device cuda [--out DIR] [--minutes 8] [--small]

It needs a checkout and the frameworks to check. Other frameworks are reported as missing. The folder receives
`conform-*.json` and `conform-*.html` for all backends, `bench` with the times, `training-*.json`, and `README.md`, a table
with the result of each part. Parts that do not finish in time are ended, and the table shows it.

Files of an earlier run in the folder are removed first.

Exit code 0: everything passed. 1: something failed or was not reached, or a part of an installed framework needs a missing
package. 2: a wrong option. 3: no installed framework has the device.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cells import FRAMEWORKS, REQUIRES
from benchmarks.results import write_text
from selfattn_core.conformance.backends import REGISTRY
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
_TRAINED = ("torch", "jax")
_WRITTEN = (
    "README.md",
    "conform-*.json",
    "conform-*.html",
    "training-*.json",
    "bench/*.json",
    "bench/*.md",
    "bench/*.png",
)


@dataclass(frozen=True)
class Part:
    """One row of the table.

    Args:
        name: name of the part.
        framework: the framework.
        verdict: "passed", "failed", "not reached" or "missing".
        words: the findings.
        seconds: duration.
    """

    name: str
    framework: str
    verdict: str
    words: str
    seconds: float = 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a device, and write the folder.

    Args:
        arguments: arguments of the command line. None means those of the process.

    Returns:
        The exit code.
    """
    options = _options(arguments)
    if all(device_problem(options.device, words) for words in WORDS.values()):
        known = "; ".join(f"{name}: {', '.join(words)}" for name, words in WORDS.items())
        print(f"--device {options.device}: no framework knows this name. {known}", file=sys.stderr)
        return 2
    check = _Check(options)
    there = {name: device for name in FRAMEWORKS if (device := check.device_of(name))}
    for name, device in there.items():
        check.conform(name, device)
    for name, device in there.items():
        check.train(name, device)
    for name, device in there.items():
        check.bench(name, device)
    check.write()
    if not there:
        return 3
    return int(any(part.verdict != "passed" for part in check.parts if part.framework in there))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device_check")
    parser.add_argument("--device", required=True, help="device as the frameworks name it, such as cuda:1")
    parser.add_argument("--out", type=Path, default=_ROOT / "build" / "device-check", metavar="DIR")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit in minutes")
    parser.add_argument("--small", action="store_true", help="a little of everything, to check that it runs")
    return parser.parse_args(arguments)


def _in_words_of(framework: str, device: str) -> str:
    """A card is "cuda" to torch, "gpu" to TensorFlow, and either to JAX."""
    if framework == "tensorflow":
        return device.replace("cuda", "gpu")
    return device.replace("gpu", "cuda") if framework == "torch" else device


class _Check:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.parts = options, list[Part]()
        self.end = time.monotonic() + 60 * options.minutes
        self.models: dict[str, str] = {}
        options.out.mkdir(parents=True, exist_ok=True)
        # Files of an earlier run must not replace parts that this run does not reach.
        for pattern in _WRITTEN:
            for path in options.out.glob(pattern):
                path.unlink()

    def device_of(self, framework: str) -> str:
        """The framework's name of the device. Empty if the framework or the device is missing."""
        asked = _in_words_of(framework, self.options.device)
        words = device_problem(asked, WORDS[framework])
        if absent := missing_modules(REQUIRES[framework][:1]):
            words = f"{', '.join(absent)} not installed"
        if not words:
            try:
                found = seen(framework, device_variables(framework, asked, os.environ))
                device = chosen(asked, found["kinds"])
            except (DeviceAbsentError, RuntimeError) as error:
                words = str(error)
            else:
                self.models[framework] = f"{device}, {found['models'][device]}"
                return device
        self.parts.append(Part("the device", framework, "missing", words))
        return ""

    def conform(self, framework: str, device: str) -> None:
        """Check all backends of the framework at the level deploy."""
        names = [name for name, each in REGISTRY.items() if each.framework == framework]
        if self.options.small:
            names = names[:1]
        for name in names:
            if absent := missing_modules(REGISTRY[name].requires):
                words = f"{name}: {', '.join(absent)} not installed"
                self.parts.append(Part("conform", framework, "missing", words))
                continue
            target = self.options.out / f"conform-{name}"
            reports = ["--json", f"{target}.json", "--html", f"{target}.html"]
            level = ["--level", "core" if self.options.small else "deploy"]
            command = ["-m", "selfattn_core", "conform", name, "--device", device, *level, *reports]
            self.run("conform", name, command, lambda target=target: _conformed(Path(f"{target}.json")))

    def train(self, framework: str, device: str) -> None:
        """Train the small SAGAN in bfloat16 with R1."""
        needs = [*REQUIRES[framework], "sklearn"]
        if framework not in _TRAINED:
            return
        if absent := missing_modules(needs):
            self.parts.append(Part("training", framework, "missing", f"{', '.join(absent)} not installed"))
            return
        steps = "4" if self.options.small else "200"
        target = self.options.out / f"training-{framework}.json"
        command = ["-m", "benchmarks.device_training", framework, device, steps, str(target)]
        variables = device_variables(framework, device, os.environ)
        self.run("training", framework, command, lambda: _trained(target), variables)

    def bench(self, framework: str, device: str) -> None:
        """Measure times and memory."""
        if absent := missing_modules(REQUIRES[framework]):
            self.parts.append(Part("bench", framework, "missing", f"{', '.join(absent)} not installed"))
            return
        folder = self.options.out / "bench"
        size = "--toy" if self.options.small else "--quick"
        command = ["-m", "benchmarks.bench", size, "--device", device, "--framework", framework]
        self.run("bench", framework, [*command, "--out", str(folder)], lambda: f"[page]({_newest(folder)})")

    def run(
        self,
        name: str,
        framework: str,
        command: Sequence[str],
        found: Callable[[], str],
        variables: dict[str, str | None] | None = None,
    ) -> None:
        """Run one part in a separate process, which ends when the time is over."""
        left, began = self.end - time.monotonic(), time.monotonic()
        if left < 1:
            self.parts.append(Part(name, framework, "not reached", "the time was over before"))
            return
        merged = {**shared_accelerator(), **os.environ, **(variables or {})}
        print(f"{framework}: {name} …", flush=True)
        with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
            # A separate session, so that processes started by the part end with it.
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=_ROOT,
                env={key: value for key, value in merged.items() if value is not None},
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(left)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["it printed nothing"])[-1]
        verdict, words = "not reached", "ended when the time was over"
        if code is not None:
            verdict = "failed" if code else "passed"
            try:
                words = found()
            except (OSError, ValueError, KeyError) as error:
                verdict, words = "failed", f"{error}; {last}"
        self.parts.append(Part(name, framework, verdict, words, time.monotonic() - began))

    def write(self) -> None:
        """The table."""
        lines = [f"# {self.options.device}", "", *(f"- {name}: {of}" for name, of in self.models.items()), ""]
        if self.options.small:
            lines += ["**A small run: it shows that everything runs, and measures nothing.**", ""]
        lines += ["| | | verdict | found | seconds |", "|---|---|---|---|---|"]
        for part in self.parts:
            words = part.words.replace("|", "\\|")
            lines.append(
                f"| {part.name} | {part.framework} | {part.verdict} | {words} | {part.seconds:.0f} |"
            )
        text = "\n".join(lines) + "\n"
        write_text(self.options.out / "README.md", text)
        print(text)


def _conformed(path: Path) -> str:
    (backend,) = json.loads(path.read_text(encoding="utf-8"))["backends"]
    counts: dict[str, int] = {}
    for outcome in backend["outcomes"]:
        counts[outcome["status"]] = counts.get(outcome["status"], 0) + 1
    precisions = ", ".join(f"{way} in {label}" for way, label in backend["device"]["precisions"].items())
    tally = ", ".join(f"{number} {status}" for status, number in counts.items())
    level = f"conformant at {backend['level'] or 'no level'}"
    return "; ".join(part for part in (tally or backend["error"], level, precisions) if part)


def _trained(path: Path) -> str:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not found["finite"]:
        raise ValueError("a loss is not finite")
    last = ", ".join(f"{name} {value:.3g}" for name, value in found["last"].items())
    return f"{found['steps']} steps, {1e3 * found['seconds_per_step']:.3g} ms each; at the end {last}"


def _newest(folder: Path) -> str:
    pages = sorted(folder.glob("*.md"), key=lambda path: path.stat().st_mtime)
    if not pages:
        raise ValueError("no page was written")
    return f"bench/{pages[-1].name}"


if __name__ == "__main__":
    sys.exit(main())
