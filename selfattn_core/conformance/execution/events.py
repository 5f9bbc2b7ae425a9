"""Events in the process of a backend. The worker writes each as one line of JSON, and its supervisor reads them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO, get_args

from selfattn_core.arrays import Array
from selfattn_core.conformance.protocol import Claims
from selfattn_core.conformance.results import Status

__all__ = [
    "Answer",
    "Answered",
    "Event",
    "Failed",
    "Finished",
    "Measured",
    "Measuring",
    "Ready",
    "Started",
    "Unanswered",
    "read",
    "write",
]


@dataclass(frozen=True)
class Ready:
    """The backend was imported. The event contains its claims."""

    versions: Mapping[str, str]
    claims: Sequence[str]
    layouts: Sequence[str]
    dtypes: Sequence[str]
    expected_failures: Mapping[str, Sequence[str]]
    device: Mapping[str, str]

    @property
    def claimed(self) -> Claims:
        """Everything that the backend claims."""
        return Claims(self.claims, self.layouts, self.dtypes)


@dataclass(frozen=True)
class Failed:
    """The backend did not start. `refused` and `absent` are as in `BackendReport`."""

    error: str
    refused: bool = False
    absent: bool = False


@dataclass(frozen=True)
class Measuring:
    """The measurement of the framework's default products starts."""


@dataclass(frozen=True)
class Measured:
    """The format of each of the framework's default products."""

    precisions: Mapping[str, str]


@dataclass(frozen=True)
class Started:
    """A run starts."""


@dataclass(frozen=True)
class Answered:
    """A run has an answer. Its arrays are in a separate file, not in the line."""

    names: Sequence[str]
    seconds: float
    arrays: Sequence[Array] = ()


@dataclass(frozen=True)
class Unanswered:
    """A run has no answer that can be compared. Its outcome gets this status and message."""

    status: Status
    message: str


@dataclass(frozen=True)
class Finished:
    """All runs are done."""


Answer = Answered | Unanswered
Event = Ready | Failed | Measuring | Measured | Started | Answer | Finished

_EVENTS: Mapping[str, type[Event]] = {each.__name__: each for each in get_args(Event)}


def write(stream: TextIO, event: Event, run: int | None = None) -> None:
    """Write an event as a line.

    Args:
        stream: the file that the supervisor watches.
        event: the event.
        run: the number of its run. None outside of runs.
    """
    if isinstance(event, Answered):
        event = replace(event, arrays=())
    stream.write(json.dumps({"event": type(event).__name__, "run": run, **asdict(event)}) + "\n")
    stream.flush()


def read(path: Path) -> list[tuple[int | None, Event]]:
    """The events of a process, each with the number of its run. An unfinished last line is ignored.

    Args:
        path: the file. It may be missing.
    """
    written = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    lines = [json.loads(line) for line in written]
    return [(line.pop("run"), _EVENTS[line.pop("event")](**line)) for line in lines]
