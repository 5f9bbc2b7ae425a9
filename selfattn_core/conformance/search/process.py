"""The process that answers a search: started when it is needed, watched, and ended when it hangs."""

import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.conformance.protocol import Claims
from selfattn_core.conformance.search.asking import Answers, Touched
from selfattn_core.conformance.search.probe import Probe
from selfattn_core.conformance.search.token import to_token

__all__ = ["Declined", "NotStartedError", "Process", "Ready", "Unanswered"]

_Event = tuple[dict[str, Any], Sequence[Array]]

_STARTUP_SECONDS = 300.0
_LOOK_AGAIN_SECONDS = 0.1
_READER_SECONDS = 1.0


class NotStartedError(Exception):
    """The backend did not start. `refused` and `absent` are as in `BackendReport`."""

    def __init__(self, message: str, *, refused: bool = False, absent: bool = False) -> None:
        super().__init__(message)
        self.refused, self.absent = refused, absent


@dataclass(frozen=True)
class Ready:
    """What a started backend says.

    Args:
        versions: the libraries that it uses.
        abilities: its claims.
        claims: what it can be asked, as `drawing.searched_claims` says.
        device: the device that it computes on, with model and driver.
    """

    versions: Mapping[str, str]
    abilities: tuple[str, ...]
    claims: Claims
    device: Mapping[str, str]


@dataclass(frozen=True)
class Unanswered:
    """A probe without an answer that can be compared.

    Args:
        how: "raises", "answers are arrays", "crash" or "timeout".
        what: the type of the exception. Empty if there was none.
        message: the reason.
    """

    how: str
    what: str
    message: str


@dataclass(frozen=True)
class Declined:
    """The backend has no layer for the configuration of a probe."""

    reason: str


class Process:
    """A backend in its own process. A process that dies or hangs is replaced at the next probe.

    Args:
        target: "module:object".
        variables: its environment.
        folder: a folder for its files.
        timeout: the seconds that one probe may take.
        device: the device to compute on.
    """

    def __init__(
        self, target: str, variables: Mapping[str, str], folder: Path, timeout: float, device: str = ""
    ) -> None:
        self.target, self.variables, self.folder = target, variables, folder
        self.timeout, self.device = timeout, device
        self.ready: Ready | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._events: queue.SimpleQueue[_Event | None] = queue.SimpleQueue()
        self._reader: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def start(self) -> Ready:
        """Start the process if it does not run.

        Raises:
            NotStartedError: if the backend does not start.
        """
        if self._process is not None and self._process.poll() is None and self.ready is not None:
            return self.ready
        self.end()
        command = [sys.executable, "-m", "selfattn_core.conformance.search.worker", self.target, self.device]
        with self._output.open("wb") as stream:
            self._process = subprocess.Popen(
                command,
                env=dict(self.variables),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                # With its children it is a group of its own, which ends as a whole, and which Ctrl-C does not reach.
                start_new_session=True,
            )
        self._events = queue.SimpleQueue()
        self._reader = threading.Thread(target=_read, args=(self._process, self._events), daemon=True)
        self._reader.start()
        found, ending = self._event(_STARTUP_SECONDS)
        if found is None:
            self.end()
            raise NotStartedError(f"{ending} while the backend was imported: {self._tail()}")
        event = found[0]
        if event["event"] == "failed":
            self.end()
            raise NotStartedError(event["error"], refused=event["refused"], absent=event["absent"])
        self.ready = Ready(
            event["versions"],
            tuple(event["abilities"]),
            Claims(event["searched"], event["layouts"], event["dtypes"]),
            event["device"],
        )
        return self.ready

    def ask(self, probe: Probe) -> Answers | Declined | Unanswered:
        """The answer to a probe.

        Args:
            probe: the probe.

        Raises:
            NotStartedError: if the backend does not start again.
        """
        self.start()
        process = self._process
        assert process is not None and process.stdin is not None  # noqa: PT018, S101 - started
        try:
            process.stdin.write(f"{to_token(probe)}\n".encode())
            process.stdin.flush()
        except OSError:
            self.end()
            return Unanswered("crash", "", f"the process had ended: {self._tail()}")
        found, ending = self._event(self.timeout)
        if found is None:
            hung = process.poll() is None
            self.end()
            return Unanswered("timeout" if hung else "crash", "", f"{ending}: {self._tail()}")
        event, arrays = found
        match event["event"]:
            case "declined":
                return Declined(event["message"])
            case "malformed":
                return Unanswered("answers are arrays", "", event["message"])
            case "raised":
                return Unanswered("raises", event["type"], event["message"])
        rest = iter(arrays)
        steps = [{name: next(rest) for name in names} for names in event["names"]]
        return Answers(steps, [Touched(*each) for each in event["touched"]])

    def end(self) -> None:
        """End the process and its children."""
        process, self._process = self._process, None
        reader, self._reader = self._reader, None
        if process is None:
            return
        _kill(process)
        process.wait()
        if process.stdin is not None:
            _close(process.stdin)
        if reader is not None:
            reader.join(_READER_SECONDS)
        # A child that has left the group may keep the pipe open. Closing it would wait for the thread that reads from it.
        if process.stdout is not None and (reader is None or not reader.is_alive()):
            _close(process.stdout)

    @property
    def _output(self) -> Path:
        return self.folder / "output.txt"

    def _event(self, seconds: float) -> "tuple[_Event | None, str]":
        """The next answer of the process, or None with the reason why there is none."""
        process = self._process
        assert process is not None  # noqa: S101 - started
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                event = self._events.get(timeout=_LOOK_AGAIN_SECONDS)
            except queue.Empty:
                if process.poll() is not None:
                    # The end of its output comes when its children have closed the pipe too.
                    _kill(process)
                continue
            if event is None:
                code = process.wait()
                how = f"died by signal {-code}" if code < 0 else f"exited with code {code}"
                return None, f"the process {how}"
            return event, ""
        return None, f"the process was ended after {seconds:g} s"

    def _tail(self) -> str:
        """The last lines that the process printed."""
        text = self._output.read_text(encoding="utf-8", errors="replace").strip()
        return " | ".join(text.splitlines()[-3:]) or "it printed nothing"


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End a process and, if the system has process groups, its children, which may outlive it."""
    if not hasattr(os, "killpg"):
        process.kill()
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _read(process: "subprocess.Popen[bytes]", events: "queue.SimpleQueue[_Event | None]") -> None:
    """Pass on each answer, and None at the end."""
    stream = process.stdout
    assert stream is not None  # noqa: S101 - a pipe
    # A process that dies leaves half a line or half an array, and a closed file has no lines.
    with suppress(ValueError):
        while line := stream.readline():
            event: dict[str, Any] = json.loads(line)
            arrays = []
            for dtype, shape in event.get("arrays", []):
                data = stream.read(np.dtype(dtype).itemsize * math.prod(shape))
                arrays.append(np.frombuffer(data, dtype).reshape(shape))
            events.put((event, arrays))
    # Here, because the end of the search does not wait for a child that keeps the pipe open.
    _close(stream)
    events.put(None)


def _close(stream: Any) -> None:
    # A line for a process that has died may still wait.
    with suppress(OSError):
        stream.close()
