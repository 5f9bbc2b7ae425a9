"""What a generated mutant is asked: the table, one case after another, and then a search, until something fails."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from selfattn_core.conformance.cases.case import LAYOUTS, Run
from selfattn_core.conformance.cases.families import FamilyName
from selfattn_core.conformance.cases.table import all_runs
from selfattn_core.conformance.execution.in_process import judge_in_process
from selfattn_core.conformance.mutants.selftest import small_runs
from selfattn_core.conformance.protocol import Backend
from selfattn_core.conformance.search.asking import ask_steps
from selfattn_core.conformance.search.drawing import drawn, searched_claims
from selfattn_core.conformance.search.judging import findings
from selfattn_core.conformance.search.material import UndecidedError, material
from selfattn_core.conformance.search.token import to_token

__all__ = ["PROBES", "Failure", "first_failure"]

PROBES = 600
"""The probes that a mutant is asked that the table does not catch, as many as `--explore 60` asks."""

_SMALL_PROBES = 128

_SLOW: tuple[FamilyName, ...] = ("trajectory", "saved", "compiled", "memory", "shipped")


@dataclass(frozen=True)
class Failure:
    """What shows that a backend is wrong.

    Args:
        how: "wrong answer" or "exception".
        run: the id of the run, or the token of the probe.
        message: the verdict.
    """

    how: Literal["wrong answer", "exception"]
    run: str
    message: str


def first_failure(
    backend: Backend, seed: int = 0, *, large: bool = False, probes: int = PROBES
) -> Failure | None:
    """The first run or probe that fails. None if the mutant survives.

    The probes are those of `--explore`, drawn at random. They are not made smaller, and no layer is compiled.

    Args:
        backend: the mutant.
        seed: the seed of the inputs.
        large: whether to ask for large feature maps too, which adapters compute in blocks and the definition does not.
        probes: the number of probes after the table.

    Example:
        >>> from selfattn_core.conformance.mutants import MUTANTS
        >>> first_failure(MUTANTS[0].make()).how
        'wrong answer'
    """
    for outcome in judge_in_process(backend, _table(large), seed):
        if outcome.status in ("fail", "error"):
            how: Literal["wrong answer", "exception"] = (
                "wrong answer" if outcome.status == "fail" else "exception"
            )
            return Failure(how, outcome.run.id, outcome.message)
    return _found(backend, seed, probes)


def _table(large: bool) -> list[Run]:
    """The runs in one layout. The quick ones are first, and memory is not included."""
    every = all_runs() if large else small_runs()
    runs = [run for run in every if run.layout == LAYOUTS[0] and run.case.family != "memory"]
    return sorted(runs, key=lambda run: (run.case.family in _SLOW, run.dtype != "float64"))


def _found(backend: Backend, seed: int, probes: int) -> Failure | None:
    generator = np.random.default_rng(seed)

    def choose(choices: Sequence[Any]) -> Any:
        return choices[int(generator.integers(len(choices)))]

    known = searched_claims(backend)
    claims = replace(known, abilities=set(known.abilities) - {"compiled", "saved"})
    for index in range(probes):
        probe = drawn(choose, claims, small=index < _SMALL_PROBES)
        try:
            material(probe)
        except UndecidedError:
            continue
        try:
            found = findings(probe, ask_steps(backend, probe))
        except Exception as error:
            return Failure("exception", to_token(probe), f"{type(error).__name__}: {error}")
        if found:
            return Failure("wrong answer", to_token(probe), found[0].message)
    return None
