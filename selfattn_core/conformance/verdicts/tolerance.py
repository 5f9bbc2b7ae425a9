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

from selfattn_core.conformance.cases.case import SIXTEEN_BITS
from selfattn_core.conformance.verdicts.product_formats import FORMATS

__all__ = [
    "ALLOWANCES",
    "CAPS",
    "EPS",
    "FACTOR",
    "FACTORS",
    "NARROW_ALLOWANCE",
    "ORDINARY_LOGITS",
    "SHIPPED_ALLOWANCE",
    "SHIPPED_FACTORS",
    "TERMS_CAP",
    "Expectation",
    "Verdict",
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

ORDINARY_LOGITS = 8.0
"""An ulp grows with the logits beyond this."""

EPS: Mapping[str, float] = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
}
"""The distance from 1 to the next number."""


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


def judge(
    quantity: str, got: Array, expectation: Expectation, dtype: str, *, factor: float | None = None
) -> Verdict:
    """Compare one quantity.

    Args:
        quantity: its name, for the message.
        got: the backend's answer.
        expectation: from `expected.expect`.
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
        expectation: from `expected.expect` or `expected.expectations`.
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
    error = float(np.abs(answer[finite] - want[finite]).max(initial=0))
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


def _held(values: Array, dtype: str) -> bool:
    """Whether a 16-bit format holds these values exactly."""
    finite = values[np.isfinite(values)]
    if dtype == "float16":
        return bool((finite.astype(np.float16).astype(np.float64) == finite).all())
    narrow = finite.astype(np.float32)
    low = np.ascontiguousarray(narrow).view(np.uint32) & 0xFFFF
    return bool((narrow.astype(np.float64) == finite).all() and not low.any())
