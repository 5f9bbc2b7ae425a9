"""The result of one run, and the results of all runs of a backend."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from selfattn_core.conformance.cases.case import Case, Run
from selfattn_core.conformance.cases.families import FAMILIES, LEVELS, Level, through
from selfattn_core.conformance.execution.devices import Device
from selfattn_core.conformance.protocol import Claims
from selfattn_core.conformance.search.finding import Search
from selfattn_core.conformance.verdicts.tolerance import Verdict

__all__ = ["BackendReport", "Outcome", "Status"]

Status = Literal["pass", "fail", "error", "unclaimed", "expected-failure"]


@dataclass(frozen=True)
class Outcome:
    """The result of one run.

    Args:
        run: the run.
        status: "error" is a crash, an exception or a timeout. "unclaimed" is an ability, dtype or layout that the backend
            does not have, or memory where it cannot be measured. An expected failure that passes is a "fail".
        verdicts: one for each compared quantity.
        message: why the run did not pass.
        reason: why the backend expects a failure. Empty if it expects none.
        link: a page about that failure.
        seconds: the time that the backend took to answer. 0 if it did not answer.
        losses: the losses of a training trajectory, one for each step.
        reference: the losses of the float64 spec at the same steps.
        floors: the noise floor of the loss at the same steps.
        label: the format of products in which the family "shipped" is judged. Empty in other families.
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
        """The largest multiple: the worst error in noise floors."""
        return max((verdict.ratio for verdict in self.verdicts), default=0.0)


@dataclass(frozen=True)
class BackendReport:
    """The results of one backend.

    Args:
        name: the name that the user gave.
        versions: the versions of the libraries that it uses.
        claims: the abilities that it claims.
        layouts: the layouts that it computes in.
        dtypes: the dtypes that it computes in.
        outcomes: one for each run, in order. Empty if the backend did not start.
        missing: the modules that are not installed.
        extra: the extra of this library that installs them.
        error: why the backend did not start.
        refused: whether it did not start because the name is not a backend, or the device is not one of its devices.
        absent: whether it did not start because this machine does not have the device.
        device: the device that it computed on.
        seconds: the time that all runs took.
        search: the results of the search. None if there was none.
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
    search: Search | None = None

    @property
    def claimed(self) -> Claims:
        """Everything that the backend claims."""
        return Claims(self.claims, self.layouts, self.dtypes)

    @property
    def passed(self) -> bool:
        """Whether the backend started, answered all claimed runs, and each answer was right or an expected failure.

        A search passes if it was not interrupted, judged an answer and found nothing.
        """
        answered = [outcome for outcome in self.outcomes if outcome.status != "unclaimed"]
        right = ("pass", "expected-failure")
        if self.error or not all(outcome.status in right for outcome in answered):
            return False
        if self.search is not None:
            search = self.search
            return not search.findings and search.answered > 0 and search.ended != "interrupt"
        return bool(answered)

    def conformant(self, level: Level) -> bool:
        """Whether the backend is conformant at a level.

        Every case of the level, and of the levels below it, must pass in at least one dtype and layout. None of their runs
        may fail, and an expected failure counts as a failure. An unclaimed case prevents the level. There is one exception:
        a case that exists only in 16 bits does not count if the backend has none of its dtypes. Each family still needs at
        least one case that counts.
        """
        families = {family for family in through(level) if not FAMILIES[family].optional}
        asked = [
            outcome
            for outcome in self.outcomes
            if outcome.run.case.family in families
            and outcome.run.case.asked_at(level)
            and self._has_dtype_for(outcome.run.case)
        ]
        passed = {outcome.run.case.id for outcome in asked if outcome.status == "pass"}
        bad = any(outcome.status not in ("pass", "unclaimed") for outcome in asked)
        ran = {outcome.run.case.family for outcome in asked}
        return ran == families and not bad and passed == {outcome.run.case.id for outcome in asked}

    def _has_dtype_for(self, case: Case) -> bool:
        return not case.narrow or not set(case.dtypes).isdisjoint(self.dtypes)

    @property
    def level(self) -> Level | None:
        """The highest level at which the backend is conformant."""
        reached = [level for level in LEVELS if self.conformant(level)]
        return reached[-1] if reached else None
