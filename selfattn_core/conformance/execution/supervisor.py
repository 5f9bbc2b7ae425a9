"""Starts the processes of a backend, watches them, and ends those that hang."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from threading import Event

import numpy as np

from selfattn_core.conformance.cases.case import Run
from selfattn_core.conformance.execution.events import (
    Answer,
    Answered,
    Failed,
    Finished,
    Measured,
    Measuring,
    Ready,
    Unanswered,
    read,
)

__all__ = ["Supervisor"]

_STARTUP_SECONDS = 300.0
_MOST_PROCESSES = 12
_MOST_TIMEOUTS = 3
_LOOK_AGAIN_SECONDS = 0.02


class Supervisor:
    """Starts one process after another, until every run has an answer or an error.

    Args:
        target: "module:object".
        variables: the environment of a process.
        folder: an empty folder for the files of the processes.
        runs: the runs.
        seed: the seed of the inputs.
        timeout: the seconds that one run may take.
        stop: an event that another thread sets to end the processes.
        device: the device to compute on. If empty, a backend that accepts devices uses the CPU.
        shipped: whether to measure the format of the framework's default products.
        over: the number of processes that the backend computes over. None for its own choice.

    Attributes:
        ready: the claims of the backend. None if it did not start.
        failed: why the backend did not start, or how its last process ended.
        precisions: the formats of the framework's default products, if they were measured.
    """

    def __init__(
        self,
        target: str,
        variables: Mapping[str, str],
        folder: Path,
        runs: Sequence[Run],
        seed: int,
        timeout: float,
        stop: Event,
        *,
        device: str = "",
        shipped: bool = False,
        over: int | None = None,
    ) -> None:
        self.target, self.variables = target, variables
        self.folder, self.seed, self.timeout = folder, seed, timeout
        self.runs, self.stop = runs, stop
        self.device, self.shipped, self.over = device, shipped, over
        self.ready: Ready | None = None
        self.failed = Failed("")
        self.precisions: Mapping[str, str] = {}
        self._answers: dict[int, Answer] = {}
        self._timeouts = 0

    def work(self) -> None:
        """Start processes until every claimed run has an answer, or until another process would not help.

        Raises:
            CancelledError: if `stop` is set.
        """
        for number in range(_MOST_PROCESSES):
            pending = self._pending()
            if not pending or not self._process(number, pending):
                return

    def answer(self, index: int) -> Answer:
        """The answer to a claimed run, or an error if no process reached the run.

        Args:
            index: the index of the run.
        """
        answer = self._answers.get(index, Unanswered("error", f"not reached: {self.failed.error}"))
        if not isinstance(answer, Answered):
            return answer
        with np.load(self.folder / f"{index}.npz") as file:
            return replace(answer, arrays=list(file.values()))

    def _pending(self) -> list[int]:
        """The runs that have no answer yet."""
        waiting = [index for index in range(len(self.runs)) if index not in self._answers]
        if self.ready is None:
            return waiting
        return [index for index in waiting if self.ready.claimed.covers(self.runs[index])]

    def _process(self, number: int, pending: list[int]) -> bool:
        """Run one process to its end, and return whether another one may answer more runs."""
        progress = self.folder / f"progress-{number}.jsonl"
        output = self.folder / f"output-{number}.txt"
        ending, hung = self._watch(self._start(number, pending, progress, output), progress)
        lines = read(progress)
        events = [event for _, event in lines]
        last = events[-1] if events else None
        if not isinstance(last, Finished):
            ending = ending or "the process exited with code 0"
        ready = next((event for event in events if isinstance(event, Ready)), None)
        self.ready = self.ready or ready
        if ready is None:
            died = Failed(f"{ending} while the backend was imported: {_tail(output)}")
            self.failed = last if isinstance(last, Failed) else died
            return False
        measured = next((event for event in events if isinstance(event, Measured)), Measured({}))
        self.precisions = self.precisions or measured.precisions
        if isinstance(last, Measuring):
            ending = f"{ending} while the framework's default products were measured: {_tail(output)}"
        ended = {run: event for run, event in lines if run is not None}
        for run, event in ended.items():
            if isinstance(event, Answer):
                self._answers[run] = event
                self._timeouts = 0
            else:
                self._answers[run] = Unanswered("error", f"{ending} in this case: {_tail(output)}")
                self._timeouts = self._timeouts + 1 if hung else 0
        self.failed = Failed(ending)
        if self._timeouts == _MOST_TIMEOUTS:
            self.failed = Failed(
                f"given up after {_MOST_TIMEOUTS} timeouts in a row, of {self.timeout:g} s each"
            )
            return False
        return bool(ended)

    def _start(
        self, number: int, pending: list[int], progress: Path, output: Path
    ) -> subprocess.Popen[bytes]:
        """A worker process for these runs."""
        runs = [
            (index, run.case.id, run.dtype, run.layout)
            for index, run in ((index, self.runs[index]) for index in pending)
        ]
        job = {
            "target": self.target,
            "folder": str(self.folder),
            "progress": str(progress),
            "seed": self.seed,
            "device": self.device,
            "shipped": self.shipped,
            "over": self.over,
            "runs": runs,
        }
        job_file = self.folder / f"job-{number}.json"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        with output.open("wb") as stream:
            return subprocess.Popen(
                [sys.executable, "-m", "selfattn_core.conformance.execution.worker", str(job_file)],
                env=dict(self.variables),
                # Nothing writes to this pipe. It closes when this process ends, which ends the worker.
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )

    def _watch(self, process: subprocess.Popen[bytes], progress: Path) -> tuple[str, bool]:
        """Wait for the process, and end it if it hangs. Return a description of any failure, and whether it hung."""
        size, since = -1, time.monotonic()
        try:
            while process.poll() is None:
                if self.stop.is_set():
                    raise CancelledError
                now = time.monotonic()
                grown = progress.stat().st_size if progress.exists() else 0
                if grown != size:
                    size, since = grown, now
                limit = self.timeout if size > 0 else _STARTUP_SECONDS
                if now - since > limit:
                    return f"the process was ended after {limit:g} s", True
                time.sleep(_LOOK_AGAIN_SECONDS)
        finally:
            process.kill()
            # This waits for the process and closes the pipe.
            process.communicate()
        code = process.returncode
        if code == 0:
            return "", False
        how = f"died by signal {-code}" if code < 0 else f"exited with code {code}"
        return f"the process {how}", False


def _tail(path: Path) -> str:
    """The last lines that the process printed."""
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    return " | ".join(text.splitlines()[-3:]) or "it printed nothing"
