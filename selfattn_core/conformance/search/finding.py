"""What the search found: failures, each with the smallest probe that shows it."""

import builtins
from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "Kind", "Search", "Skipped", "Status"]

Status = Literal["fail", "error", "flaky"]
Kind = tuple[str, str, str]


@dataclass(frozen=True)
class Finding:
    """One failure.

    Args:
        property: what does not hold, such as "definition" or "arguments untouched".
        ask: the step that shows it.
        quantity: the array that shows it. Empty if there is none.
        message: the verdict.
        status: "fail" is a wrong answer, "error" an exception, a crash or a timeout, and "flaky" two answers to one probe.
        token: the smallest probe that shows it.
        words: that probe for a person.
        probes: the number of probes that the search had asked when it met the failure.
    """

    property: str
    ask: str
    quantity: str
    message: str
    status: Status = "fail"
    token: str = ""
    words: str = ""
    probes: int = 0

    @builtins.property
    def kind(self) -> Kind:
        """What keeps failures apart: the property, the step and the quantity."""
        return self.property, self.ask, self.quantity


@dataclass(frozen=True)
class Skipped:
    """A token without an answer to judge.

    Args:
        token: the token.
        why: "stale" if this version cannot replay it, "unclaimed" if the backend does not claim what it needs or declines
            its layer, and "undecided" if two correct implementations could answer differently.
        message: the reason.
    """

    token: str
    why: Literal["stale", "unclaimed", "undecided"]
    message: str


@dataclass(frozen=True)
class Search:
    """The results of one search.

    Args:
        seed: its seed.
        seconds: the time that it took.
        budget: the most probes that it was to ask.
        probes: the number of different probes that it asked, with those that made a failure smaller.
        steps: the number of their calls.
        findings: the failures, each of another kind.
        ended: why it ended: "budget", "time", "interrupt", "gave up", or "replay" if it only repeated tokens.
        answered: the number of probes that were judged. The backend declined the others.
        skipped: the tokens without an answer to judge.
        exit_code: what the signal that ended it asks a command to exit with. 0 if there was none, or if it was Ctrl-C.
    """

    seed: int = 0
    seconds: float = 0.0
    budget: int = 0
    probes: int = 0
    steps: int = 0
    findings: tuple[Finding, ...] = ()
    ended: Literal["budget", "time", "interrupt", "gave up", "replay"] = "budget"
    answered: int = 0
    skipped: tuple[Skipped, ...] = ()
    exit_code: int = 0
