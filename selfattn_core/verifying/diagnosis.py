"""Explanations of wrong answers: a known bug or another config that gives the same answers as the artifact."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.conformance.cases.case import Case
from selfattn_core.conformance.cases.inputs import Inputs
from selfattn_core.conformance.mutants import function
from selfattn_core.conformance.reference import Reference
from selfattn_core.conformance.verdicts.expected import quantities
from selfattn_core.conformance.verdicts.tolerance import Expectation, measure
from selfattn_core.params import parameter_table

__all__ = ["Evidence", "diagnose"]


# The most positions of inputs for the search, or of a single input if there are no smaller ones. Each bug takes as long to
# compute as the definition.
_MOST_POSITIONS = 1024
_MOST_POSITIONS_OF_ONE = 2304
_WINDOWS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Evidence:
    """An input and the artifact's answers to it.

    Args:
        x: (B, H, W, C), float64.
        answers: answers of the artifact by quantity, float64, in the definition's layout.
        expectations: expected answers by quantity.
        passed: whether the answers are within the limits.
    """

    x: Array
    answers: Mapping[str, Array]
    expectations: Mapping[str, Expectation]
    passed: bool


def diagnose(
    config: SelfAttentionConfig, params: Mapping[str, Array], evidence: Sequence[Evidence], factor: float
) -> list[str] | None:
    """The explanations that fit all the evidence within the limits, as text.

    Args:
        config: config of the weights.
        params: the weights, float64.
        evidence: inputs and answers, including correct answers.
        factor: number of noise floors that an error may reach.

    Returns:
        The explanations. None if there was no search, because all wrong answers belong to large maps.
    """
    wrong = sorted((each for each in evidence if not each.passed), key=lambda each: each.x.size)
    if not wrong:
        return []
    if _positions(wrong[0]) > _MOST_POSITIONS_OF_ONE:
        return None
    small = [each for each in evidence if _positions(each) <= _MOST_POSITIONS]
    # Wrong answers are tested first, because most explanations fail there at once.
    small.sort(key=lambda each: (each.passed, each.x.size))
    if _positions(wrong[0]) > _MOST_POSITIONS:
        small = [_first_sample(wrong[0])]
    return [
        words
        for words, answer in _explanations(config, params)
        if all(_explains(answer, each, factor) for each in small)
    ]


def _positions(evidence: Evidence) -> int:
    return int(evidence.x.shape[1] * evidence.x.shape[2])


def _first_sample(evidence: Evidence) -> Evidence:
    return Evidence(
        evidence.x[:1],
        {name: answer[:1] for name, answer in evidence.answers.items()},
        {name: replace(each, want=each.want[:1]) for name, each in evidence.expectations.items()},
        evidence.passed,
    )


def _explains(answer: Callable[[Array, str], Array], evidence: Evidence, factor: float) -> bool:
    for quantity, got in evidence.answers.items():
        try:
            want = answer(evidence.x, quantity)
        except (ValueError, ArithmeticError, IndexError, AssertionError):
            # A bug that cannot be computed at this size does not explain this answer.
            return False
        if got.shape != want.shape:
            return False
        expectation = replace(evidence.expectations[quantity], want=want)
        if not measure(quantity, got, expectation, factor).passed:
            return False
    return True


def _explanations(
    config: SelfAttentionConfig, params: Mapping[str, Array]
) -> Iterator[tuple[str, Callable[[Array, str], Array]]]:
    for side in _WINDOWS:
        if side != config.kv_pool:
            words = f"it computes kv_pool = {side}, and the weights are for kv_pool = {config.kv_pool}"
            yield words, _asked(Reference(), replace(config, kv_pool=side), params)
    if config.spectral_norm:
        raw = {name: params[name] for name in parameter_table(config)}
        words = "it applies the raw kernels, without spectral norm"
        yield words, _asked(Reference(), replace(config, spectral_norm=False), raw)
    for words, reference in _known_bugs():
        yield words, _asked(reference, config, params)


@cache
def _known_bugs() -> tuple[tuple[str, Reference], ...]:
    """The known bugs, cached because compiling them from the definition's text takes longer than running them."""
    made = ((mutant, mutant.make()) for mutant in function.MUTANTS if not mutant.raises)
    return tuple(
        (f"{mutant.name}{f' (as in {mutant.seen_in})' if mutant.seen_in else ''}", backend)
        for mutant, backend in made
        if isinstance(backend, Reference)
    )


def _asked(
    reference: Reference, config: SelfAttentionConfig, params: Mapping[str, Array]
) -> Callable[[Array, str], Array]:
    def answer(x: Array, quantity: str) -> Array:
        batch, height, width, _ = x.shape
        case = Case("", "map" if quantity == "map" else "forward", "", config, (batch, height, width))
        given = Inputs(params, x, np.zeros_like(x))
        found = quantities(case, given, "float64", reference)[quantity]
        return found.astype(np.float64)

    return answer
