"""What a generated mutant is asked: the table, one case after another, until one of them fails."""

from selfattn_core.conformance.cases.case import LAYOUTS, Run
from selfattn_core.conformance.cases.families import FamilyName
from selfattn_core.conformance.cases.table import all_runs
from selfattn_core.conformance.execution.in_process import judge_in_process
from selfattn_core.conformance.mutants.selftest import small_runs
from selfattn_core.conformance.protocol import Backend
from selfattn_core.conformance.results import Outcome

__all__ = ["first_failure"]

_SLOW: tuple[FamilyName, ...] = ("trajectory", "saved", "compiled", "memory", "shipped")


def first_failure(backend: Backend, seed: int = 0, *, large: bool = False) -> Outcome | None:
    """The first run that fails. None if the mutant survives.

    This is the one place that decides what generated mutants are asked. A search over inputs belongs after the table.

    Args:
        backend: the mutant.
        seed: the seed of the inputs.
        large: whether to ask for large feature maps too, which adapters compute in blocks and the definition does not.

    Example:
        >>> from selfattn_core.conformance.mutants import MUTANTS
        >>> first_failure(MUTANTS[0].make()).status
        'fail'
    """
    for outcome in judge_in_process(backend, _table(large), seed):
        if outcome.status in ("fail", "error"):
            return outcome
    return None


def _table(large: bool) -> list[Run]:
    """The runs in one layout. The quick ones are first, and memory is not included."""
    every = all_runs() if large else small_runs()
    runs = [run for run in every if run.layout == LAYOUTS[0] and run.case.family != "memory"]
    return sorted(runs, key=lambda run: (run.case.family in _SLOW, run.dtype != "float64"))
