"""Events in the process of a backend. The worker writes each as one line of JSON, and its supervisor reads them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO, get_args

from numpy.typing import NDArray

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

Array = NDArray[Any]


@dataclass(frozen=True)
class Ready:
    """The backend was imported, and this is what it claims."""

    versions: Mapping[str, str]
    claims: Sequence[str]
    layouts: Sequence[str]
    dtypes: Sequence[str]
    expected_failures: Mapping[str, Sequence[str]]
    device: Mapping[str, str]

    @property
    def claimed(self) -> Claims:
        """All that it claims."""
        return Claims(self.claims, self.layouts, self.dtypes)


@dataclass(frozen=True)
class Failed:
    """The backend did not start; `refused` and `absent` are those of `BackendReport`."""

    error: str
    refused: bool = False
    absent: bool = False


@dataclass(frozen=True)
class Measuring:
    """The framework's own products are about to be measured."""


@dataclass(frozen=True)
class Measured:
    """The format of each of those products."""

    precisions: Mapping[str, str]


@dataclass(frozen=True)
class Started:
    """A run is about to be asked."""


@dataclass(frozen=True)
class Answered:
    """A run has an answer. Its arrays are stored in a file of their own, not in the line."""

    names: Sequence[str]
    seconds: float
    arrays: Sequence[Array] = ()


@dataclass(frozen=True)
class Unanswered:
    """A run has no answer that can be compared; status and message are those of its outcome."""

    status: Status
    message: str


@dataclass(frozen=True)
class Finished:
    """Every run was asked."""


Answer = Answered | Unanswered
Event = Ready | Failed | Measuring | Measured | Started | Answer | Finished

_EVENTS: Mapping[str, type[Event]] = {each.__name__: each for each in get_args(Event)}


def write(stream: TextIO, event: Event, run: int | None = None) -> None:
    """Write an event as a line.

    Args:
        stream: of the file that the supervisor watches.
        event: what happens.
        run: the number of the run that it happens in; None outside of runs.
    """
    if isinstance(event, Answered):
        event = replace(event, arrays=())
    stream.write(json.dumps({"event": type(event).__name__, "run": run, **asdict(event)}) + "\n")
    stream.flush()


def read(path: Path) -> list[tuple[int | None, Event]]:
    """The events of a process, each with the number of its run. An unfinished last line is ignored.

    Args:
        path: of the file, which need not exist.
    """
    written = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    lines = [json.loads(line) for line in written]
    return [(line.pop("run"), _EVENTS[line.pop("event")](**line)) for line in lines]
