"""The kit on broken implementations: each has to be caught by the cases that are there for it."""

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

# More positions do not show a numpy mutant more than few do, and take a hundred times as long.
_MOST_POSITIONS = 100


@dataclass(frozen=True)
class Kill:
    """What became of a mutant.

    Args:
        mutant: which.
        outcome: the run that saw it best: of those that failed, the one with the largest finite error, or else the
            first; None if it survived.
        failed: how many runs of its family saw it.
        asked: how many there were.
        unasked: why there were none, on this system; empty if there were.
    """

    mutant: Mutant
    outcome: Outcome | None
    failed: int
    asked: int
    unasked: str = ""

    @property
    def multiple(self) -> float:
        """The largest error in noise floors; infinite if what came could not be compared with one."""
        return 0.0 if self.outcome is None else self.outcome.ratio


def self_test(
    mutants: Iterable[Mutant] | None = None, *, seed: int = 0, tell: Callable[[Kill], None] = lambda _: None
) -> list[Kill]:
    """Run every mutant on the cases of its family, in this process.

    Args:
        mutants: which; by default all that ship with the kit.
        seed: of the inputs.
        tell: called with each result as it comes.
    """
    kills = []
    for mutant in MUTANTS if mutants is None else mutants:
        backend = mutant.make()
        runs = [run for run in small_runs() if run.case.family == mutant.family]
        kills.append(kill := _kill(mutant, list(judge_in_process(backend, runs, seed))))
        tell(kill)
    return kills


def small_runs(families: Sequence[FamilyName] | None = None) -> list[Run]:
    """The runs that take no time in numpy, and those about memory.

    Args:
        families: which; by default all.
    """
    return [
        run
        for run in all_runs()
        if (families is None or run.case.family in families)
        and (run.case.shape[1] * run.case.shape[2] <= _MOST_POSITIONS or run.case.family == "memory")
    ]


def _kill(mutant: Mutant, outcomes: list[Outcome]) -> Kill:
    # One that breaks down shows nothing of what the cases see.
    seen = ("fail", "error") if mutant.raises else ("fail",)
    bad = [outcome for outcome in outcomes if outcome.status in seen]
    asked = [outcome for outcome in outcomes if outcome.status != "unclaimed"]
    unasked = outcomes[0].message if outcomes and not asked else ""
    compared = [outcome for outcome in bad if 0 < outcome.ratio < np.inf]
    best = max(compared, key=lambda outcome: outcome.ratio) if compared else next(iter(bad), None)
    return Kill(mutant, best, len(bad), len(asked), unasked)
