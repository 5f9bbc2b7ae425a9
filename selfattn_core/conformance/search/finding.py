"""What the search found: one failure, with the smallest probe that shows it."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "Kind", "Search", "Status"]

Status = Literal["fail", "error", "flaky"]
Kind = tuple[str, str, str]


@dataclass(frozen=True)
class Finding:
    """One failure.

    Args:
        rule: the property that does not hold, such as "definition" or "arguments untouched".
        ask: the step that shows it.
        quantity: the array that shows it. Empty if there is none.
        message: the verdict.
        status: "fail" is a wrong answer, "error" an exception, a crash or a timeout, and "flaky" two answers to one probe.
        token: the smallest probe that shows it.
        words: that probe for a person.
        probes: the number of probes that the search had asked when it met the failure.
    """

    rule: str
    ask: str
    quantity: str
    message: str
    status: Status = "fail"
    token: str = ""
    words: str = ""
    probes: int = 0

    @property
    def kind(self) -> Kind:
        """What keeps failures apart: the property, the step and the quantity."""
        return self.rule, self.ask, self.quantity


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
    """

    seed: int = 0
    seconds: float = 0.0
    budget: int = 0
    probes: int = 0
    steps: int = 0
    findings: tuple[Finding, ...] = ()
    ended: Literal["budget", "time", "interrupt", "gave up", "replay"] = "budget"
