"""One policy for every comparison: the error beside the noise floor of the same arithmetic on the same input.

The floor of a quantity is the error of the numpy spec, run in the dtype under test, against the spec in float64, plus
a few ulp, since that error is one draw and can be small by luck. A comparison passes if the error is at most `FACTOR`
floors, and at most a hard cap in ulp so that a noisy spec cannot hide a bug. float64 takes the spec's error in
float32 times 2⁻²⁹, the ratio of the two epsilons.

An ulp here is eps times the largest wanted value, and grows with the logits beyond 8, as the softmax's own error
does. Gradients of biases and of gamma are sums that cancel: their ulp is eps times the sum of their absolute terms
(`spec.magnitudes`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfattn_core import spec
from selfattn_core.conformance.cases import Case, Inputs, inputs

__all__ = ["ALLOWANCES", "CAPS", "FACTOR", "Expectation", "Verdict", "expect", "judge"]

Array = NDArray[Any]

FACTOR = 8.0
"""Noise floors that an error may reach."""

ALLOWANCES: Mapping[str, float] = {"forward": 1.0, "map": 2.0, "vjp": 2.0, "r1": 8.0}
"""Ulp that are added to the error of the spec to make the floor, by family."""

CAPS: Mapping[str, float] = {"forward": 16.0, "map": 16.0, "vjp": 128.0, "r1": 512.0}
"""Ulp that an error may reach, by family."""

_ORDINARY_LOGITS = 8.0


@dataclass(frozen=True)
class Expectation:
    """What one quantity of a case should be.

    Args:
        want: the spec in float64.
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
        ratio: error in noise floors.
        passed: whether it is within the policy.
        message: why not; empty if it passed.
    """

    quantity: str
    error: float
    ratio: float
    passed: bool
    message: str = ""


def quantities(case: Case, given: Inputs) -> dict[str, Array]:
    """What the spec says to a case, in the dtype of the input."""
    if case.family == "forward":
        return {"y": spec.forward(case.config, given.params, given.x)}
    if case.family == "map":
        return {"map": spec.attention_map(case.config, given.params, given.x)}
    if case.family == "vjp":
        return spec.vjp(case.config, given.params, given.x, given.dy)
    if case.family == "r1":
        value, gradients = spec.r1(case.config, given.params, given.x, given.dy)
        return {"r1": np.array(value)} | gradients
    return dict(given.params)


def expect(case: Case, dtype: str, seed: int = 0) -> dict[str, Expectation]:
    """What each quantity of a case should be, and how far from it an error may be.

    Args:
        case: of any family but "params", which is compared bit for bit.
        dtype: "float32" or "float64".
        seed: as for `inputs`.
    """
    given = inputs(case, dtype, seed)
    wide = _cast(given, "float64")
    want = quantities(case, wide)
    noisy = inputs(case, "float32", seed)
    reference = want if dtype == "float32" else quantities(case, _cast(noisy, "float64"))
    noise = quantities(case, noisy)
    ratio = float(np.finfo(dtype).eps / np.finfo("float32").eps)
    second = case.family == "r1"
    dy = wide.dy if case.family in ("vjp", "r1") else None
    magnitudes = spec.magnitudes(case.config, wide.params, wide.x, dy, second=second)
    growth = max(1.0, magnitudes.pop("logits") / _ORDINARY_LOGITS)
    expectations = {}
    for name, value in want.items():
        scale = magnitudes.get(name, float(np.abs(value).max(initial=0)))
        ulp = float(np.finfo(dtype).eps) * scale * growth
        error = float(np.abs(noise[name] - reference[name]).max(initial=0)) * ratio
        floor = error + ALLOWANCES[case.family] * ulp
        expectations[name] = Expectation(value, floor, CAPS[case.family] * ulp)
    return expectations


def judge(quantity: str, got: Array, expectation: Expectation, dtype: str) -> Verdict:
    """Compare one quantity.

    Args:
        quantity: its name, for the message.
        got: the backend's answer.
        expectation: from `expect`.
        dtype: that the answer should have.
    """
    want = expectation.want
    if got.shape != want.shape:
        return _unusable(quantity, f"shape {got.shape}, expected {want.shape}")
    if str(got.dtype) != dtype and quantity != "r1":
        return _unusable(quantity, f"dtype {got.dtype}, expected {dtype}")
    difference = np.abs(got.astype(np.float64) - want)
    if not np.isfinite(difference).all():
        return _unusable(quantity, "NaN or infinity where a number was expected")
    error = float(difference.max(initial=0))
    ratio = 0.0 if error == 0 else error / expectation.floor if expectation.floor else np.inf
    message = ""
    if ratio > FACTOR:
        message = (
            f"{quantity}: error {error:.2g} is {ratio:.3g} × the noise floor, at most {FACTOR:g} × is allowed"
        )
    elif error > expectation.cap:
        message = f"{quantity}: error {error:.2g} is above the hard cap of {expectation.cap:.2g}"
    return Verdict(quantity, error, ratio, not message, message)


def _unusable(quantity: str, received: str) -> Verdict:
    return Verdict(quantity, np.inf, np.inf, False, f"{quantity}: got {received}")


def _cast(given: Inputs, dtype: str) -> Inputs:
    params = {name: value.astype(dtype) for name, value in given.params.items()}
    return Inputs(params, given.x.astype(dtype), given.dy.astype(dtype))
