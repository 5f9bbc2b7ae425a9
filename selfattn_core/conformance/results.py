"""What came of a run, and of all runs of a backend."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from selfattn_core.conformance.cases.case import Case, Run
from selfattn_core.conformance.cases.families import FAMILIES, LEVELS, Level, through
from selfattn_core.conformance.execution.devices import Device
from selfattn_core.conformance.protocol import Claims
from selfattn_core.conformance.verdicts.tolerance import Verdict

__all__ = ["BackendReport", "Outcome", "Status"]

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
        losses: of a training trajectory, one for each step.
        reference: the losses of the float64 spec at the same steps.
        floors: the noise floor of the loss at the same steps.
        label: the format of products that the family "shipped" was held to; empty in the others.
    """

    run: Run
    status: Status
    verdicts: tuple[Verdict, ...] = ()
    message: str = ""
    reason: str = ""
    link: str = ""
    seconds: float = 0.0
    losses: tuple[float, ...] = ()
    reference: tuple[float, ...] = ()
    floors: tuple[float, ...] = ()
    label: str = ""

    @property
    def ratio(self) -> float:
        """The worst error in noise floors."""
        return max((verdict.ratio for verdict in self.verdicts), default=0.0)


@dataclass(frozen=True)
class BackendReport:
    """Everything about one backend.

    Args:
        name: as it was asked for.
        versions: of the libraries underneath.
        claims: the abilities that it claims.
        layouts: that it computes in.
        dtypes: that it computes in.
        outcomes: one for each run, in order; empty if it did not start.
        missing: modules that are not installed.
        extra: the extra of this library that installs them.
        error: why it did not start.
        refused: whether that is because what was named is no backend, or no device of it.
        absent: whether that is because the device is not in this machine.
        device: that it computed on.
        seconds: that it took.
    """

    name: str
    versions: Mapping[str, str] = field(default_factory=dict)
    claims: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    missing: tuple[str, ...] = ()
    extra: str = ""
    error: str = ""
    refused: bool = False
    absent: bool = False
    device: Device = field(default_factory=Device)
    seconds: float = 0.0

    @property
    def claimed(self) -> Claims:
        """All that it claims."""
        return Claims(self.claims, self.layouts, self.dtypes)

    @property
    def passed(self) -> bool:
        """Whether it started, answered everything that it claims, and every answer was right or its failure expected."""
        answered = [outcome for outcome in self.outcomes if outcome.status != "unclaimed"]
        right = ("pass", "expected-failure")
        return not self.error and bool(answered) and all(outcome.status in right for outcome in answered)

    def conformant(self, level: Level) -> bool:
        """Whether it is conformant at a level.

        That is: every case of the level, and of those below it, was run and passed in at least one dtype and layout,
        and none of their runs failed, be it expected or not. What a backend does not claim it is not conformant in; but
        of cases in 16 bits alone, those that exist in none of its dtypes are not asked for, if there is one that does.
        """
        families = {family for family in through(level) if not FAMILIES[family].optional}
        asked = [
            outcome
            for outcome in self.outcomes
            if outcome.run.case.family in families and self._has_dtype_for(outcome.run.case)
        ]
        passed = {outcome.run.case.id for outcome in asked if outcome.status == "pass"}
        bad = any(outcome.status not in ("pass", "unclaimed") for outcome in asked)
        ran = {outcome.run.case.family for outcome in asked}
        return ran == families and not bad and passed == {outcome.run.case.id for outcome in asked}

    def _has_dtype_for(self, case: Case) -> bool:
        return not case.narrow or not set(case.dtypes).isdisjoint(self.dtypes)

    @property
    def level(self) -> Level | None:
        """The highest level that it is conformant at."""
        reached = [level for level in LEVELS if self.conformant(level)]
        return reached[-1] if reached else None
