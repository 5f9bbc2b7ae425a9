"""The process that runs an artifact, seen from outside: starting it, asking it, and restarting it after a crash."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.conformance.execution.environment import environment
from selfattn_core.verifying.artifact import Tensor
from selfattn_core.verifying.containers import Runtime
from selfattn_core.verifying.errors import VerifyError

__all__ = ["Answer", "CrashedError", "Description", "Process"]


_OPENING_SECONDS = 120.0
_ANSWER_SECONDS = 60.0
_MOMENT = 2.0


@dataclass(frozen=True)
class Description:
    """The description of an opened file.

    Args:
        inputs: all inputs.
        outputs: all outputs.
        versions: versions of the runtime.
        formats: dtypes of stored weights and of products, if the runtime provides them.
        notes: notes of the runtime for the reader of a report.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    versions: Mapping[str, str]
    formats: frozenset[str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """The answer to one input.

    Args:
        outputs: arrays in the order of the request. Empty if there is an error.
        dtypes: dtypes of the outputs in the file.
        error: error of the runtime, or how its process ended.
        raised: whether the runtime itself raised the error and still runs.
    """

    outputs: tuple[Array, ...] = ()
    dtypes: tuple[str, ...] = ()
    error: str = ""
    raised: bool = False


class CrashedError(Exception):
    """The runtime ended its process while it opened the file, or did not finish in time."""


class Process:
    """A file in its runtime, in a separate process. Use it in a `with` statement.

    Args:
        runtime: the runtime.
        artifact: the file.
        input_name: tensor where a part of a network starts, or None for the file's own input.
        output_names: tensors where the part ends.
        seconds: time limit for one input.

    Raises:
        VerifyError: if the runtime refuses the file.
        CrashedError: if the runtime ends the process, or does not finish in time.
    """

    def __init__(
        self,
        runtime: Runtime,
        artifact: str,
        *,
        input_name: str | None = None,
        output_names: tuple[str, ...] = (),
        seconds: float = _ANSWER_SECONDS,
    ) -> None:
        self.runtime, self.artifact, self.seconds = runtime, artifact, seconds
        self.scratch = tempfile.TemporaryDirectory(prefix="selfattn-verify-")
        self.folder = Path(self.scratch.name)
        job = {
            "target": runtime.target,
            "artifact": artifact,
            "input": input_name,
            "outputs": output_names,
            "folder": str(self.folder),
        }
        (self.folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        self.process: subprocess.Popen[str] | None = None
        self.reader: threading.Thread | None = None
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> Description:
        """Start the process and return the description of the file."""
        said = self._start()
        return Description(
            tuple(_tensor(each) for each in said["inputs"]),
            tuple(_tensor(each) for each in said["outputs"]),
            said["versions"],
            frozenset(said["formats"]),
            tuple(said["notes"]),
        )

    def ask(self, x: Array, dtype: str, input_name: str, output_names: tuple[str, ...]) -> Answer:
        """The answer of the file to an input. A process that has ended is started again first.

        Args:
            x: input in the layout of the file.
            dtype: dtype of the file's input.
            input_name: name of the input in the file.
            output_names: names of the outputs in the file.
        """
        if self.process is None:
            self._start()
        process = self.process
        if process is None or process.stdin is None:
            raise AssertionError("a process was started and is not there")
        np.save(self.folder / "x.npy", x, allow_pickle=False)
        asked = {"dtype": dtype, "input": input_name, "outputs": output_names}
        try:
            process.stdin.write(f"{json.dumps(asked)}\n")
            process.stdin.flush()
            said = self._listen(self.seconds)
        except (BrokenPipeError, CrashedError) as error:
            ending = str(error) if isinstance(error, CrashedError) else self._ending()
            return Answer(error=f"the runtime did not answer: {ending}")
        if said["event"] == "raised":
            return Answer(error=said["error"], raised=True)
        outputs = (
            np.load(self.folder / f"output-{number}.npy", allow_pickle=False)
            for number in range(len(output_names))
        )
        return Answer(tuple(outputs), tuple(said["dtypes"]))

    def close(self) -> None:
        """End the process, and remove its files."""
        self._end()
        self.scratch.cleanup()

    def _start(self) -> dict[str, Any]:
        self.lines = queue.SimpleQueue()
        with (self.folder / "said.txt").open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "selfattn_core.verifying.worker", str(self.folder / "job.json")],
                env=environment(self.runtime.environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                encoding="utf-8",
                # A process group, so that children of the runtime can be ended too.
                start_new_session=True,
            )
        self.reader = threading.Thread(target=_read, args=(self.process, self.lines), daemon=True)
        self.reader.start()
        said = self._listen(_OPENING_SECONDS)
        if said["event"] == "refused":
            self._end()
            raise VerifyError(f"{self.artifact}: {self.runtime.name} does not open it: {said['error']}")
        return said

    def _listen(self, seconds: float) -> dict[str, Any]:
        """The next line. Raise an error if the process ended without one."""
        try:
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            self._end()
            raise CrashedError(f"its process gave no answer in {seconds:g} s and was ended") from None
        if not line:
            raise CrashedError(self._ending())
        said: dict[str, Any] = json.loads(line)
        return said

    def _ending(self) -> str:
        """How a process ended, and the last lines that it printed."""
        process = self.process
        code = process.wait() if process is not None else 0
        self._end()
        how = f"died by signal {-code}" if code < 0 else f"exited with code {code}"
        printed = (self.folder / "said.txt").read_text(encoding="utf-8", errors="replace").strip()
        last = " | ".join(printed.splitlines()[-3:])
        return f"its process {how}{f': {last}' if last else ''}"

    def _end(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        _kill(process)
        process.wait()
        if self.reader is not None:
            self.reader.join(_MOMENT)
        streams = [process.stdin]
        # A child of the runtime may hold the stream open. Closing it would wait for the reader, which waits for its end.
        streams += [] if self.reader is not None and self.reader.is_alive() else [process.stdout]
        for stream in streams:
            # A stream to a process that has ended cannot be flushed.
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()


def _kill(process: "subprocess.Popen[str]") -> None:
    """End a process and, if the system has process groups, its children."""
    if not hasattr(os, "killpg"):
        process.kill()
        return
    # The process itself may have ended while its children still run.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _read(process: "subprocess.Popen[str]", lines: "queue.SimpleQueue[str]") -> None:
    """Pass on every line, and an empty one at the end."""
    if process.stdout is not None:
        try:
            for line in process.stdout:
                lines.put(line)
        except ValueError:
            # The code that ended the process closed the stream.
            pass
    lines.put("")


def _tensor(said: Mapping[str, Any]) -> Tensor:
    shape = said["shape"]
    return Tensor(said["name"], said["dtype"], None if shape is None else tuple(shape))
