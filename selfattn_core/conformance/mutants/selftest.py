"""The self-test: runs the kit on the mutants. The cases of its family must catch each one."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from selfattn_core.conformance.cases.case import Run
from selfattn_core.conformance.cases.families import FamilyName
from selfattn_core.conformance.cases.table import all_runs
from selfattn_core.conformance.execution.in_process import judge_in_process
from selfattn_core.conformance.mutants import MUTANTS, Mutant
from selfattn_core.conformance.results import Outcome

__all__ = ["Kill", "self_test", "small_runs"]

# Larger feature maps catch no further numpy mutants of the other families, and take a hundred times as long.
_MOST_POSITIONS = 100


@dataclass(frozen=True)
class Kill:
    """The result of one mutant.

    Args:
        mutant: the mutant.
        outcome: the failed run with the largest finite error. Without a finite error it is the first failed run. None if
            the mutant survived.
        failed: the number of runs of its family that caught it.
        asked: the number of runs of its family.
        unasked: why this system can run none of them. Empty if it can.
    """

    mutant: Mutant
    outcome: Outcome | None
    failed: int
    asked: int
    unasked: str = ""

    @property
    def multiple(self) -> float:
        """The largest error in noise floors. Infinite if the answer could not be compared with one."""
        return 0.0 if self.outcome is None else self.outcome.ratio


def self_test(
    mutants: Iterable[Mutant] | None = None, *, seed: int = 0, tell: Callable[[Kill], None] = lambda _: None
) -> list[Kill]:
    """Run every mutant on the cases of its family, in this process.

    Args:
        mutants: the mutants. By default all of `MUTANTS`.
        seed: the seed of the inputs.
        tell: called with each result when it is ready.
    """
    kills = []
    for mutant in MUTANTS if mutants is None else mutants:
        backend = mutant.make()
        every = all_runs() if mutant.family == "large" else small_runs()
        runs = [run for run in every if run.case.family == mutant.family]
        kills.append(kill := _kill(mutant, list(judge_in_process(backend, runs, seed))))
        tell(kill)
    return kills


def small_runs(families: Sequence[FamilyName] | None = None) -> list[Run]:
    """The runs that are fast in numpy, and those about memory.

    Args:
        families: the families. By default all.
    """
    return [
        run
        for run in all_runs()
        if (families is None or run.case.family in families)
        and (run.case.shape[1] * run.case.shape[2] <= _MOST_POSITIONS or run.case.family == "memory")
    ]


def _kill(mutant: Mutant, outcomes: list[Outcome]) -> Kill:
    # An exception does not show that the comparison catches the bug.
    seen = ("fail", "error") if mutant.raises else ("fail",)
    bad = [outcome for outcome in outcomes if outcome.status in seen]
    asked = [outcome for outcome in outcomes if outcome.status != "unclaimed"]
    unasked = outcomes[0].message if outcomes and not asked else ""
    compared = [outcome for outcome in bad if 0 < outcome.ratio < np.inf]
    best = max(compared, key=lambda outcome: outcome.ratio) if compared else next(iter(bad), None)
    return Kill(mutant, best, len(bad), len(asked), unasked)
