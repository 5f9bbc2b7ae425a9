"""What came of a run."""

from dataclasses import dataclass
from typing import Literal

from selfattn_core.conformance.runs import Run
from selfattn_core.conformance.tolerance import Verdict

__all__ = ["Outcome", "Status"]

Status = Literal["pass", "fail", "error", "unclaimed", "expected-failure"]


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Args:
        run: which.
        status: "error" is a crash, an exception or a timeout; "unclaimed" an ability, dtype or layout that the backend
            does not have, or memory where it cannot be measured; an expected failure that passes is a "fail".
        verdicts: one for each quantity that was compared.
        message: why it is not a pass.
        reason: why a failure was expected; empty if none was.
        link: where that can be read up.
        seconds: that the backend took to answer; 0 if it did not.
        losses: the curve of a training trajectory, one loss for each step.
    """

    run: Run
    status: Status
    verdicts: tuple[Verdict, ...] = ()
    message: str = ""
    reason: str = ""
    link: str = ""
    seconds: float = 0.0
    losses: tuple[float, ...] = ()

    @property
    def ratio(self) -> float:
        """The worst error in noise floors."""
        return max((verdict.ratio for verdict in self.verdicts), default=0.0)
