"""Maps whose positions are copies of few. The answers follow from those of the few, without any work on N×N scores.

Let each of m positions occur r times, in x, dy and the cotangent of x. A row of the map then gives the copies of a key equal
weights, a/r each in place of a, so that y is that of the m positions. By symmetry so are dx and its derivatives. What sums
over positions, which is the penalty and the gradients of the parameters, is r times as large.

This holds for a layer without pooling. A test compares it with the definition at small sizes.
"""

from dataclasses import replace
from functools import cache

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.conformance.cases.case import Case

__all__ = ["few", "growth", "of_copies", "order", "times"]

_MAPS = ("x", "y", "dy")


def few(case: Case) -> Case:
    """The case of the positions that differ. Its inputs have the same draws.

    Args:
        case: a case with copies.

    Example:
        >>> from selfattn_core import SelfAttentionConfig
        >>> few(Case("mine", "memory", "", SelfAttentionConfig(8), (2, 4, 6), copies=4)).shape
        (2, 1, 6)
    """
    if case.config.kv_pool > 1 or case.shape[1] * case.shape[2] % case.copies:
        raise ValueError(
            f"{case.id}: {case.copies} copies of each position of {case.shape} with kv_pool {case.config.kv_pool}; "
            "expected no pooling, and a number of positions that the copies divide"
        )
    batch, height, width = case.shape
    shape = (batch, 1, height * width // case.copies)
    return replace(case, family="forward", of=case.computation, shape=shape, copies=1)


@cache
def order(case: Case) -> Array:
    """For each position, which of the few it is a copy of.

    It drifts: copies are near one another and mixed with others, so that every block of keys has some that are new.

    Args:
        case: a case with copies.
    """
    positions = case.shape[1] * case.shape[2]
    kinds = np.repeat(np.arange(positions // case.copies), case.copies)
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([*case.id.encode()])))
    return np.asarray(kinds[np.argsort(kinds + generator.uniform(0, kinds[-1] / 4, positions))])


def of_copies(case: Case, maps: Array) -> Array:
    """Maps of the few positions (B, 1, m, …) as maps of all of them (B, H, W, …).

    Args:
        case: a case with copies.
        maps: the maps.
    """
    return maps[:, 0, order(case)].reshape(*case.shape, *maps.shape[3:])


def growth(case: Case, quantity: str) -> int:
    """How many times as large a quantity is as that of `few(case)`.

    Args:
        case: a case with copies that computes y or derivatives.
        quantity: the name of the quantity.
    """
    return 1 if quantity in _MAPS else case.copies


def times(case: Case, quantity: str, found: Array) -> Array:
    """A quantity of a case, from that of `few(case)`.

    Args:
        case: as for `growth`.
        quantity: the name of the quantity.
        found: its value for `few(case)`.
    """
    return of_copies(case, found) if quantity in _MAPS else found * growth(case, quantity)
