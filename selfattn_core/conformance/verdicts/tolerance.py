"""One policy for every comparison: the error beside the noise floor of the same arithmetic on the same input.

The floor of a quantity is the error of the numpy spec, run in the dtype under test, against the spec in float64, plus
a few ulp, since that error is one draw and can be small by luck. In float32 it is the larger one of two errors: the
spec divides exponentials by their sum, fused kernels subtract its logarithm from the logits and take D from the
output, and both are right. A comparison passes if the error is at most `FACTORS` floors, and at most a hard cap in
ulp so that a noisy spec cannot hide a bug. Two dtypes borrow the error of another, times the ratio of the epsilons:
float64 has nothing wider to be compared with, and numpy has no bfloat16.

An ulp here is eps times the largest wanted value, and grows with the logits beyond 8, as the softmax's own error
does (from 1 on where the map is uniform, and the spec makes no such error); but not in 16 bits where queries and keys
are exact, for what rounds their logits then is float32. Gradients of biases and of gamma are sums that cancel: their ulp
is eps times the sum of their absolute terms (`spec.magnitudes`). What is exactly zero because all its terms cancel has
the ulp of those terms (`cancellation.terms_through_the_map`), and where nearly all cancel they raise the cap.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfattn_core import spec
from selfattn_core.conformance.cases.inputs import Inputs, inputs
from selfattn_core.conformance.cases.table import SIXTEEN_BITS, Case
from selfattn_core.conformance.questions.ask import answers
from selfattn_core.conformance.reference import FusedLayer, LayerReference, Reference
from selfattn_core.conformance.verdicts.cancellation import terms_through_the_map
from selfattn_core.conformance.verdicts.product_formats import FORMATS, rounding_layer

__all__ = [
    "ALLOWANCES",
    "CAPS",
    "EPS",
    "FACTOR",
    "FACTORS",
    "NARROW_ALLOWANCE",
    "SHIPPED_ALLOWANCE",
    "SHIPPED_FACTORS",
    "TERMS_CAP",
    "Expectation",
    "Verdict",
    "expect",
    "expect_on",
    "expect_shipped",
    "expectations",
    "judge",
    "measure",
]

Array = NDArray[Any]

FACTOR = 8.0
"""Noise floors that an error may reach in float32 and float64."""

FACTORS: Mapping[str, float] = {"float32": FACTOR, "float64": FACTOR, "bfloat16": 4.0, "float16": 4.0}
"""The same by dtype: in 16 bits the roundings that the spec does too are nearly all of the error."""

SHIPPED_FACTORS: Mapping[str, float] = {label: FACTOR if label == "float32" else 4.0 for label in FORMATS}
"""The same of the family "shipped", by format: where operands are rounded, that is nearly all of the error, as in 16 bits."""

ALLOWANCES: Mapping[str, float] = {"forward": 1.0, "map": 2.0, "vjp": 2.0, "r1": 8.0}
"""Ulp that are added to the error of the spec to make the floor, by kind of quantity."""

NARROW_ALLOWANCE = 2.0
"""The most of them in 16 bits, where the error of the spec is nearly all of the floor."""

SHIPPED_ALLOWANCE = 0.25
"""The most of them where operands of products are rounded: that is all of the error, and twice the floor tells formats apart."""

CAPS: Mapping[str, float] = {"forward": 16.0, "map": 16.0, "vjp": 128.0, "r1": 512.0}
"""Ulp that an error may reach, by kind of quantity."""

TERMS_CAP = 2.0
"""Or so many of the terms that cancel, where little of them is left."""

EPS: Mapping[str, float] = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
}
"""The distance from 1 to the next number."""

_NOISE = {"float64": "float32", "float32": "float32", "float16": "float16", "bfloat16": "float16"}
_ORDINARY_LOGITS = 8.0


@dataclass(frozen=True)
class Expectation:
    """What one quantity of a case should be.

    Args:
        want: the spec in float64; NaN where NaN is right.
        floor: the noise floor, absolute.
        cap: the largest error, absolute.
    """

    want: Array
    floor: float
    cap: float


@dataclass(frozen=True)
class Verdict:
    """How one quantity compares.

    Args:
        quantity: "y", "map", "r1", "x" or a canonical parameter name.
        error: the largest absolute difference; infinite where a finite value was wanted and none came.
        ratio: error in noise floors; of what is not compared with one, 0 if it is right and infinite if it is not.
        passed: whether it is within the policy.
        message: why not; empty if it passed.
    """

    quantity: str
    error: float
    ratio: float
    passed: bool
    message: str = ""


def quantities(case: Case, given: Inputs, dtype: str, reference: Reference | None = None) -> dict[str, Array]:
    """What the spec, or another version of it, says to a case in a dtype that numpy has."""
    # Overflow and NaN are what some cases are about.
    with np.errstate(all="ignore"):
        return dict(answers(reference or Reference(), case, given, dtype, "channels_last"))


def expect(case: Case, dtype: str, seed: int = 0) -> dict[str, Expectation]:
    """What each quantity of a case should be, and how far from it an error may be.

    Args:
        case: of any family whose quantities are compared with the noise floor.
        dtype: one of `EPS`.
        seed: as for `inputs`.
    """
    other = _NOISE[dtype]
    given = inputs(case, dtype, seed)
    return expect_on(case, given, given if other == dtype else inputs(case, other, seed), dtype)


def expect_on(case: Case, given: Inputs, noisy: Inputs, dtype: str) -> dict[str, Expectation]:
    """The same on an input that is given.

    Args:
        case: as for `expect`.
        given: the input, as `inputs` gives it in the dtype.
        noisy: the input on which the spec's error is measured: the same, or for a dtype that borrows the error of another
            one in that dtype.
        dtype: one of `EPS`.
    """
    other = _NOISE[dtype]
    wide = _cast(given)
    want = quantities(case, wide, "float64")
    reference = want if noisy is given else quantities(case, _cast(noisy), "float64")
    noises = [quantities(case, noisy, other)]
    if other == "float32":
        noises.append(quantities(case, noisy, other, LayerReference(FusedLayer)))
    ratio = EPS[dtype] / EPS[other]
    with np.errstate(invalid="ignore"):
        errors = {
            name: max(_largest(noise[name].astype(np.float64) - value) for noise in noises) * ratio
            for name, value in reference.items()
        }
    return expectations(case, wide, want, errors, dtype)


def expect_shipped(case: Case, label: str, seed: int = 0) -> dict[str, Expectation]:
    """What each quantity of a float32 case should be where products are computed in a format, and how far off it may be.

    The error that makes the floor is that of the spec with the operands of all its products rounded to the format. Of
    float32 it is that of `expect`.

    Args:
        case: of the family "shipped".
        label: one of `FORMATS`.
        seed: as for `inputs`.
    """
    if label == "float32":
        return expect(case, label, seed)
    given = inputs(case, "float32", seed)
    wide = _cast(given)
    want = quantities(case, wide, "float64")
    noise = quantities(case, given, "float32", LayerReference(rounding_layer(label)))
    errors = {name: _largest(noise[name].astype(np.float64) - value) for name, value in want.items()}
    return expectations(case, wide, want, errors, label)


def expectations(
    case: Case, wide: Inputs, want: Mapping[str, Array], errors: Mapping[str, float], dtype: str
) -> dict[str, Expectation]:
    """What each quantity should be and the noise floor and cap around it, of a spec with these errors.

    Args:
        case: of any family whose quantities are compared with the noise floor.
        wide: its input, in at least float64; arrays of dtype object are computed with as the spec does.
        want: what each quantity should be, in float64.
        errors: the largest absolute error that the spec makes in each.
        dtype: one of `EPS` or `FORMATS`, which the errors are in.
    """
    sums, growth = _sizes(case, wide)
    eps = EPS[dtype] if dtype in EPS else FORMATS[dtype].eps
    narrow = eps > EPS["float32"]
    if case.integers and narrow:
        growth = 1.0
    terms = _terms(case, wide)
    found = {}
    for name, value in want.items():
        of = name.removesuffix(" again")
        kind, cancelled = _kind(case, name), terms.get(of, 0.0)
        size = sums.get(of, _largest(value)) * growth or cancelled
        ulp = eps * size
        allowance = min(ALLOWANCES[kind], _most_allowed(dtype))
        cap = max(CAPS[kind] * ulp, TERMS_CAP * eps * growth * cancelled)
        found[name] = Expectation(value, errors[name] + allowance * ulp, cap)
    return found


def _most_allowed(dtype: str) -> float:
    """The most ulp that are added to the error of the spec."""
    if dtype in SIXTEEN_BITS:
        return NARROW_ALLOWANCE
    return SHIPPED_ALLOWANCE if dtype not in EPS else np.inf


def judge(
    quantity: str, got: Array, expectation: Expectation, dtype: str, *, factor: float | None = None
) -> Verdict:
    """Compare one quantity.

    Args:
        quantity: its name, for the message.
        got: the backend's answer.
        expectation: from `expect`.
        dtype: that the answer should have; for 16 bits float32 is right too, if the values are those of the format.
        factor: noise floors that the error may reach; by default those of the dtype.
    """
    half = dtype in SIXTEEN_BITS
    if str(got.dtype) != dtype and quantity != "r1" and not (half and got.dtype == np.float32):
        return _unusable(quantity, f"dtype {got.dtype}, expected {dtype}")
    answer = got.astype(np.float64)
    # The penalty is a number, of no dtype.
    if half and quantity != "r1" and not _held(answer, dtype):
        return _unusable(quantity, f"values that {dtype} does not hold: it is computed in something wider")
    return measure(quantity, answer, expectation, FACTORS[dtype] if factor is None else factor)


def measure(quantity: str, answer: Array, expectation: Expectation, factor: float) -> Verdict:
    """Compare the values of one quantity, whatever they were stored in.

    Args:
        quantity: its name, for the message.
        answer: in float64.
        expectation: from `expect` or `expectations`.
        factor: noise floors that an error may reach.

    Example:
        >>> ones = np.ones(2)
        >>> measure("y", ones + 1e-6, Expectation(ones, 1e-7, 1e-4), 8.0).message
        'y: error 1e-06 is 10 × the noise floor, at most 8 × is allowed'
    """
    want = expectation.want
    if answer.shape != want.shape:
        return _unusable(quantity, f"shape {answer.shape}, expected {want.shape}")
    finite = np.isfinite(want)
    if not np.isfinite(answer[finite]).all():
        return _unusable(quantity, "NaN or infinity where a number was expected")
    if np.isfinite(answer[~finite]).any():
        return _unusable(quantity, "a number where NaN was expected")
    error = _largest(answer[finite] - want[finite])
    ratio = 0.0 if error == 0 else error / expectation.floor if expectation.floor else np.inf
    message = ""
    if ratio > factor:
        message = (
            f"{quantity}: error {error:.2g} is {ratio:.3g} × the noise floor, at most {factor:g} × is allowed"
        )
    elif error > expectation.cap:
        message = f"{quantity}: error {error:.2g} is above the hard cap of {expectation.cap:.2g}"
    return Verdict(quantity, error, ratio, not message, message)


def _unusable(quantity: str, received: str) -> Verdict:
    return Verdict(quantity, np.inf, np.inf, False, f"{quantity}: got {received}")


def _kind(case: Case, quantity: str) -> str:
    """Which allowance and cap a quantity has."""
    if _is_second(case):
        return "r1"
    if quantity == "map":
        return "map"
    return "forward" if quantity.partition(" ")[0] == "y" or quantity in ("again", "rebuilt") else "vjp"


def _sizes(case: Case, wide: Inputs) -> tuple[dict[str, float], float]:
    """The sums of absolute terms by quantity, and by how much the logits let errors grow."""
    sums: dict[str, float] = {}
    for x, dy in _samples(case, wide):
        cotangents = _cotangents(case, wide, x, dy)
        found = spec.magnitudes(
            case.config, wide.params, x, dy if _is_derivative(case) else None, cotangents=cotangents
        )
        sums = {name: max(value, sums.get(name, 0.0)) for name, value in found.items()}
    # Equal logits are rounded alike by the spec, so its map has no error to show; by others they need not be.
    ordinary = 1.0 if case.constant and case.family == "map" else _ORDINARY_LOGITS
    return sums, max(1.0, sums.pop("logits") / ordinary)


def _terms(case: Case, wide: Inputs) -> dict[str, float]:
    """The sums of absolute terms of what vanishes, by quantity."""
    sums: dict[str, float] = {}
    for x, dy in _samples(case, wide) if _is_derivative(case) else ():
        found = terms_through_the_map(
            case.config, wide.params, x, dy, cotangents=_cotangents(case, wide, x, dy)
        )
        sums = {name: max(value, sums.get(name, 0.0)) for name, value in found.items()}
    return sums


def _samples(case: Case, wide: Inputs) -> list[tuple[Array, Array]]:
    """What is derived at once: x and dy."""
    if case.family != "per_sample":
        return [(wide.x, wide.dy)]
    return [(wide.x[b : b + 1], wide.dy[b : b + 1]) for b in range(wide.x.shape[0])]


def _is_derivative(case: Case) -> bool:
    kinds = {"vjp", "training_vjp", "r1", "mixed", "per_sample", "evaluation"}
    return not kinds.isdisjoint((case.family, case.of))


def _is_second(case: Case) -> bool:
    return case.of != "evaluation" and not {"r1", "mixed"}.isdisjoint((case.family, case.of))


def _cotangents(case: Case, wide: Inputs, x: Array, dy: Array) -> Mapping[str, Array] | None:
    """Of the first derivatives, if the case is about second ones."""
    if "mixed" in (case.family, case.of):
        return wide.cotangents
    if _is_second(case):
        return {"x": 2 * spec.vjp(case.config, wide.params, x, dy)["x"]}
    return None


def _largest(values: Array) -> float:
    """The largest finite absolute value."""
    return float(np.abs(values[np.isfinite(values)]).max(initial=0))


def _held(values: Array, dtype: str) -> bool:
    """Whether a 16-bit format holds these values exactly."""
    finite = values[np.isfinite(values)]
    if dtype == "float16":
        return bool((finite.astype(np.float16).astype(np.float64) == finite).all())
    narrow = finite.astype(np.float32)
    low = np.ascontiguousarray(narrow).view(np.uint32) & 0xFFFF
    return bool((narrow.astype(np.float64) == finite).all() and not low.any())


def _cast(given: Inputs) -> Inputs:
    """The same values in float64."""

    def wide(array: Array) -> Array:
        return array.astype(np.float64)

    return Inputs(
        {name: wide(value) for name, value in given.params.items()},
        wide(given.x),
        wide(given.dy),
        wide(given.other),
        {name: wide(value) for name, value in given.cotangents.items()},
    )
