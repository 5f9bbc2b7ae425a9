"""The expected value, noise floor and cap of each quantity of a case, all three computed with the spec."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np

from selfattn_core import spec
from selfattn_core.arrays import Array
from selfattn_core.conformance.cases.case import SIXTEEN_BITS, Case
from selfattn_core.conformance.cases.copies import few, growth, times
from selfattn_core.conformance.cases.inputs import Inputs, inputs
from selfattn_core.conformance.questions.ask import answers
from selfattn_core.conformance.reference import FusedLayer, LayerReference, NarrowFusedLayer, Reference
from selfattn_core.conformance.verdicts.cancellation import terms_through_the_map
from selfattn_core.conformance.verdicts.product_formats import FORMATS, rounding_layer
from selfattn_core.conformance.verdicts.tolerance import (
    ALLOWANCES,
    CAPS,
    DEVIATION,
    EPS,
    NARROW_ALLOWANCE,
    NARROW_DEVIATION,
    ORDINARY_LOGITS,
    SHIPPED_ALLOWANCE,
    TERMS_CAP,
    Expectation,
)

__all__ = [
    "NOISE",
    "Part",
    "differentiated",
    "expect",
    "expect_on",
    "expect_shipped",
    "expectations",
    "quantities",
]


NOISE = {"float64": "float32", "float32": "float32", "float16": "float16", "bfloat16": "float16"}
"""The dtype whose error the floor of each dtype is made from."""


def quantities(case: Case, given: Inputs, dtype: str, reference: Reference | None = None) -> dict[str, Array]:
    """The answers of the spec, or of a variant of it, to a case in a dtype that numpy has."""
    # Some cases test overflow and NaN.
    with np.errstate(all="ignore"):
        return dict(answers(reference or Reference(), case, given, dtype, "channels_last"))


class Part(NamedTuple):
    """Arrays that are differentiated together.

    Args:
        x: feature maps.
        dy: the gradient of y.
        cotangents: those of the first derivatives, or None if the case does not compute second derivatives.
    """

    x: Array
    dy: Array
    cotangents: Mapping[str, Array] | None


def expect(case: Case, dtype: str, seed: int = 0) -> dict[str, Expectation]:
    """The expected value of each quantity of a case, and the error that is allowed.

    Args:
        case: a case of any family whose quantities are compared with the noise floor.
        dtype: one of `EPS`.
        seed: as for `inputs`.
    """
    if case.copies > 1:
        return _of_copies(case, expect(few(case), dtype, seed))
    other = NOISE[dtype]
    given = inputs(case, dtype, seed)
    return expect_on(case, given, given if other == dtype else inputs(case, other, seed), dtype)


def expect_on(case: Case, given: Inputs, noisy: Inputs, dtype: str) -> dict[str, Expectation]:
    """The expectations of `expect` for a given input.

    Args:
        case: as for `expect`.
        given: the input, as `inputs` returns it in the dtype.
        noisy: the input on which the spec's error is measured. It is the same object, or the input in the dtype whose
            error this dtype borrows.
        dtype: one of `EPS`.
    """
    other = NOISE[dtype]
    wide = given.in_float64()
    want = quantities(case, wide, "float64")
    reference = want if noisy is given else quantities(case, noisy.in_float64(), "float64")
    fused = LayerReference(FusedLayer if other == "float32" else NarrowFusedLayer)
    noises = [quantities(case, noisy, other), quantities(case, noisy, other, fused)]
    ratio = EPS[dtype] / EPS[other]
    with np.errstate(invalid="ignore"):
        errors = {
            name: max(_largest(noise[name].astype(np.float64) - value) for noise in noises) * ratio
            for name, value in reference.items()
        }
    return expectations(case, _passed(case, wide), want, errors, dtype)


def _of_copies(case: Case, of_few: Mapping[str, Expectation]) -> dict[str, Expectation]:
    """What is expected of copies, from what is expected of the few positions.

    The errors of a sum of r times as many terms are relative to it up to √r times as large, in any order of summation.
    """
    found = {}
    for name, each in of_few.items():
        size = growth(case, name) * np.sqrt(case.copies)
        found[name] = Expectation(times(case, name, each.want), each.floor * size, each.cap * size)
    return found


def _passed(case: Case, wide: Inputs) -> Inputs:
    """The input with the state after the training passes of the case."""
    params = dict(wide.params)
    for _ in range(case.passes):
        params |= spec.power_iteration(case.config, params)
    return replace(wide, params=params)


def expect_shipped(case: Case, label: str, seed: int = 0) -> dict[str, Expectation]:
    """The expected value of each quantity of a float32 case, and the error that is allowed for products in a format.

    The noise floor comes from the error of the spec with the operands of all its products rounded to the format. For the
    format float32 it is that of `expect`.

    Args:
        case: a case of the family "shipped".
        label: one of `FORMATS`.
        seed: as for `inputs`.
    """
    if label == "float32":
        return expect(case, label, seed)
    given = inputs(case, "float32", seed)
    wide = given.in_float64()
    want = quantities(case, wide, "float64")
    noise = quantities(case, given, "float32", LayerReference(rounding_layer(label)))
    errors = {name: _largest(noise[name].astype(np.float64) - value) for name, value in want.items()}
    return expectations(case, wide, want, errors, label)


def expectations(
    case: Case, wide: Inputs, want: Mapping[str, Array], errors: Mapping[str, float], dtype: str
) -> dict[str, Expectation]:
    """The expected value, noise floor and cap of each quantity, from the errors of the spec.

    Args:
        case: a case of any family whose quantities are compared with the noise floor.
        wide: its input, in at least float64. Arrays may have dtype object, as for the spec.
        want: the expected value of each quantity, in float64.
        errors: the largest absolute error of the spec in each quantity.
        dtype: the one of `EPS` or `FORMATS` in which the spec made the errors.
    """
    parts = differentiated(case, wide)
    sums, growth = _sizes(case, wide, parts)
    eps = EPS[dtype] if dtype in EPS else FORMATS[dtype].eps
    narrow = eps > EPS["float32"]
    if case.integers and narrow:
        growth = 1.0
    terms, deviations = _terms(case, wide, parts, 1), _terms(case, wide, parts, 2)
    deviation_eps = eps * _roundings_of_terms(case, dtype)
    found = {}
    for name, value in want.items():
        of = name.removesuffix(" again")
        kind, cancelled = _kind(case, name), terms.get(of, 0.0)
        size = sums.get(of, _largest(value)) * growth or cancelled
        ulp = eps * size
        allowance = min(ALLOWANCES[kind], _most_allowed(dtype))
        cap = max(CAPS[kind] * ulp, TERMS_CAP * eps * growth * cancelled)
        deviation = deviation_eps * growth * deviations.get(of, 0.0)
        found[name] = Expectation(value, errors[name] + allowance * ulp + deviation, cap)
    return found


def _most_allowed(dtype: str) -> float:
    """The largest number of ulp that is added to the error of the spec."""
    if dtype in SIXTEEN_BITS:
        return NARROW_ALLOWANCE
    return SHIPPED_ALLOWANCE if dtype not in EPS else np.inf


def _roundings_of_terms(case: Case, dtype: str) -> float:
    """The standard deviation of the error of one term that passes through the map, in eps."""
    if dtype in SIXTEEN_BITS:
        # For first derivatives, the fused layer measures it, over all the rows of a case.
        return NARROW_DEVIATION if case.order == 2 else 0.0
    return DEVIATION if dtype in EPS else 0.0


def _kind(case: Case, quantity: str) -> str:
    """The key of `ALLOWANCES` and `CAPS` for a quantity."""
    if case.order == 2:
        return "r1"
    if quantity == "map":
        return "map"
    return "forward" if quantity.partition(" ")[0] == "y" or quantity in ("again", "rebuilt") else "vjp"


def _sizes(case: Case, wide: Inputs, parts: Sequence[Part]) -> tuple[dict[str, float], float]:
    """The sums of absolute terms by quantity, and the factor by which the logits let errors grow."""
    sums: dict[str, float] = {}
    for x, dy, cotangents in parts:
        found = spec.magnitudes(
            case.config, wide.params, x, dy if case.order else None, cotangents=cotangents
        )
        sums = {name: max(value, sums.get(name, 0.0)) for name, value in found.items()}
    # The spec rounds equal logits alike, so its uniform map has no error. Other implementations may round them differently.
    ordinary = 1.0 if case.constant and case.computation == "map" else ORDINARY_LOGITS
    return sums, max(1.0, sums.pop("logits") / ordinary)


def _terms(case: Case, wide: Inputs, parts: Sequence[Part], order: Literal[1, 2]) -> dict[str, float]:
    """The norms of the terms of quantities that may vanish, by quantity. `order` is that of the norm."""
    sums: dict[str, float] = {}
    for x, dy, cotangents in parts if case.order else ():
        found = terms_through_the_map(case.config, wide.params, x, dy, cotangents=cotangents, order=order)
        sums = {name: max(value, sums.get(name, 0.0)) for name, value in found.items()}
    return sums


def differentiated(case: Case, wide: Inputs) -> list[Part]:
    """What is differentiated together: the whole batch, or each sample.

    Args:
        case: the case.
        wide: its input in float64.
    """
    pairs = [(wide.x, wide.dy)]
    if case.computation == "per_sample":
        pairs = [(wide.x[b : b + 1], wide.dy[b : b + 1]) for b in range(wide.x.shape[0])]
    return [Part(x, dy, _cotangents(case, wide, x, dy)) for x, dy in pairs]


def _cotangents(case: Case, wide: Inputs, x: Array, dy: Array) -> Mapping[str, Array] | None:
    """The cotangents of the first derivatives, or None if the case does not compute second derivatives."""
    if case.computation == "mixed":
        return wide.cotangents
    if case.order == 2:
        return {"x": 2 * spec.vjp(case.config, wide.params, x, dy)["x"]}
    return None


def _largest(values: Array) -> float:
    """The largest finite absolute value."""
    return float(np.abs(values[np.isfinite(values)]).max(initial=0))
