"""The tolerances: how large an error may be, as a multiple of the noise floor of the same arithmetic on the same input.

The noise floor of a quantity is the error of the spec in the dtype under test, compared with the spec in float64, plus a
few ulp. The added ulp are there because that error is one draw and can be small by luck. The floor uses the larger of two
errors. The spec divides exponentials by their sum. Fused kernels subtract the logarithm of the sum from the logits in
float32, and round the map in 16 bits. They compute D from the output. Both are correct.

Derivatives through the map are differences of terms that may be nearly equal. In the spec their rounding errors nearly cancel
too, but not in every correct implementation (`cancellation`). So the floor also contains the standard deviation of the sum of
the errors of these terms: `DEVIATION`·eps·√Σt².

A comparison passes if the error is at most `FACTORS` floors, and at most a hard cap in ulp. The cap keeps a noisy spec from
hiding a bug. Two dtypes borrow the error of another one, times the ratio of the epsilons: float64, because no wider dtype
exists for the comparison, and bfloat16, because numpy does not have it.

An ulp here is eps times the largest expected value. Four rules change it:

- It grows in proportion to the logits beyond 8, as the error of the softmax does. Where the map is uniform, the spec makes
  no such error, and the ulp grows beyond 1. In 16 bits with exact queries and keys it does not grow, because only float32
  rounds the logits there.
- Gradients of biases and of gamma are sums that cancel. Their ulp is eps times the sum of their absolute terms
  (`spec.magnitudes`).
- A quantity that is exactly zero because all its terms cancel has the ulp of those terms.
- Where nearly all terms cancel, the terms raise the cap.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.conformance.cases.case import SIXTEEN_BITS
from selfattn_core.conformance.verdicts.product_formats import FORMATS

__all__ = [
    "ALLOWANCES",
    "CAPS",
    "DEVIATION",
    "EPS",
    "FACTOR",
    "FACTORS",
    "NARROW_ALLOWANCE",
    "NARROW_DEVIATION",
    "ORDINARY_LOGITS",
    "SHIPPED_ALLOWANCE",
    "SHIPPED_FACTORS",
    "TERMS_CAP",
    "Expectation",
    "Verdict",
    "judge",
    "measure",
]


FACTOR = 8.0
"""The largest multiple of the noise floor that passes in float32 and float64."""

FACTORS: Mapping[str, float] = {"float32": FACTOR, "float64": FACTOR, "bfloat16": 4.0, "float16": 4.0}
"""The factor by dtype. In 16 bits it is smaller, because the spec makes nearly all of the roundings too."""

SHIPPED_FACTORS: Mapping[str, float] = {label: FACTOR if label == "float32" else 4.0 for label in FORMATS}
"""The factor of the family "shipped" by format. It is smaller where rounded operands cause nearly all of the error."""

ALLOWANCES: Mapping[str, float] = {"forward": 1.0, "map": 2.0, "vjp": 2.0, "r1": 8.0}
"""The ulp that the floor adds to the error of the spec, by kind of quantity."""

NARROW_ALLOWANCE = 2.0
"""The most ulp that the floor adds in 16 bits, where the error of the spec is nearly all of the floor."""

SHIPPED_ALLOWANCE = 0.25
"""The most ulp that the floor adds where operands of products are rounded. A larger floor would hide a coarser format."""

CAPS: Mapping[str, float] = {"forward": 16.0, "map": 16.0, "vjp": 128.0, "r1": 512.0}
"""The cap in ulp, by kind of quantity."""

DEVIATION = 1.0
"""The standard deviation of the error of one term through the map, in eps, for float32 and float64.

One rounding is off by at most eps/2, evenly distributed, which has the standard deviation eps/√12. A term passes about twelve:
those of q, k, v and G, of the score, of its distance from the largest, of the exponential, of the sum and the quotient, of dA,
and of two products. Their variances add up to 12·eps²/12.
"""

NARROW_DEVIATION = 0.5
"""The same for second derivatives in 16 bits, where a term passes three roundings to 16 bits: of the map, of its gradient, and
of the output in D. √(3/12) = 1/2."""

TERMS_CAP = 2.0
"""The cap in eps times the cancelling terms, where that is larger."""

ORDINARY_LOGITS = 8.0
"""The logits beyond which an ulp grows."""

EPS: Mapping[str, float] = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
}
"""The distance from 1 to the next number."""


@dataclass(frozen=True)
class Expectation:
    """The expected value of one quantity of a case.

    Args:
        want: the value of the spec in float64. NaN where NaN is expected.
        floor: the noise floor, absolute.
        cap: the cap, absolute.
    """

    want: Array
    floor: float
    cap: float


@dataclass(frozen=True)
class Verdict:
    """The comparison of one quantity.

    Args:
        quantity: "y", "map", "r1", "x" or a canonical parameter name.
        error: the largest absolute difference. Infinite if a value is not finite where a finite one is expected.
        ratio: the error in noise floors. Without a noise floor, 0 if the quantity is right and infinite if it is wrong.
        passed: whether the error is allowed.
        message: why the quantity did not pass. Empty if it passed.
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
        dtype: the dtype that the answer should have. A 16-bit answer may be float32 if the format can represent its values.
        factor: the largest multiple that passes. By default that of the dtype.
    """
    half = dtype in SIXTEEN_BITS
    if str(got.dtype) != dtype and quantity != "r1" and not (half and got.dtype == np.float32):
        return _unusable(quantity, f"dtype {got.dtype}, expected {dtype}")
    answer = got.astype(np.float64)
    # The penalty is a Python number without a dtype.
    if half and quantity != "r1" and not _held(answer, dtype):
        return _unusable(
            quantity, f"values that {dtype} cannot represent, expected a result rounded to {dtype}"
        )
    return measure(quantity, answer, expectation, FACTORS[dtype] if factor is None else factor)


def measure(quantity: str, answer: Array, expectation: Expectation, factor: float) -> Verdict:
    """Compare the values of one quantity, independent of the dtype that stored them.

    Args:
        quantity: its name, for the message.
        answer: the values in float64.
        expectation: from `expected.expect` or `expected.expectations`.
        factor: the largest multiple that passes.

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
    """Whether a 16-bit format can represent these values exactly."""
    finite = values[np.isfinite(values)]
    if dtype == "float16":
        return bool((finite.astype(np.float16).astype(np.float64) == finite).all())
    narrow = finite.astype(np.float32)
    low = np.ascontiguousarray(narrow).view(np.uint32) & 0xFFFF
    return bool((narrow.astype(np.float64) == finite).all() and not low.any())
