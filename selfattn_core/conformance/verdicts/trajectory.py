"""Judging a training: how far it may deviate from the training of the float64 spec.

Rounding errors grow along a trajectory. The spec trained in float32 shows how much, compared with the spec trained in
float64. A backend may deviate by `FACTOR` times that plus a few ulp, and by no more than a hard cap. In float64 the same
growth counts times 2⁻²⁹.
"""

from collections.abc import Mapping
from functools import cache

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.conformance.cases.case import Case
from selfattn_core.conformance.questions.training import (
    Trajectory,
    problem,
    quantities,
    reference,
    spec_trained,
)
from selfattn_core.conformance.verdicts.tolerance import EPS, FACTOR, Verdict

__all__ = ["curve_floors", "judge_trajectory"]


_CURVE_ULP, _CURVE_CAP = 4.0, 256.0
"""In ulp of the first loss: the addition to the floor of the curve, and its cap."""

_WEIGHT_ULP, _WEIGHT_CAP = 4.0, 2048.0
"""The same for final weights, in ulp of the largest weight of the tensor, at the start or at the end.

The start counts because a gamma that falls from 0.5 to 0.03 was rounded at 0.5.
"""


def judge_trajectory(
    case: Case, found: Mapping[str, Array], dtype: str, seed: int = 0
) -> tuple[Verdict, ...]:
    """Compare a trajectory with that of the float64 spec.

    Args:
        case: a case of the family "trajectory".
        found: the answers, from `train`.
        dtype: the dtype of the training.
        seed: as for `problem`.

    Returns:
        A verdict on the curve and one on each tensor of final weights. The ratio is the error in floors. On the curve it
        is that of the worst step, and the floor there is the largest error of the spec in float32 up to that step.
    """
    want = reference(case, seed)
    noise = _noise(case, seed)
    eps = EPS[dtype]
    scale = eps / EPS["float32"]
    cap = _CURVE_CAP * eps * float(want.losses[0])
    floors = curve_floors(case, dtype, seed)
    verdicts = [_verdict("loss", found["loss"], want.losses, floors, cap, "float64")]
    for name, value in quantities(case, want).items():
        if name != "loss":
            start = problem(case, seed).start[name]
            ulp = eps * float(max(np.abs(value).max(), np.abs(start).max()))
            floor = float(np.abs(noise.params[name] - value).max()) * scale + _WEIGHT_ULP * ulp
            verdicts.append(_verdict(name, found[name], value, np.asarray(floor), _WEIGHT_CAP * ulp, dtype))
    return tuple(verdicts)


def curve_floors(case: Case, dtype: str, seed: int = 0) -> Array:
    """The noise floor of the loss at each step, (STEPS,), absolute.

    Args:
        case: a case of the family "trajectory".
        dtype: "float32" or "float64".
        seed: as for `problem`.
    """
    want = reference(case, seed).losses
    eps = EPS[dtype]
    scale = eps / EPS["float32"]
    grown = np.maximum.accumulate(np.abs(_noise(case, seed).losses - want)) * scale
    return np.asarray(grown + _CURVE_ULP * eps * want[0])


def _verdict(quantity: str, got: Array, want: Array, floors: Array, cap: float, dtype: str) -> Verdict:
    if got.shape != want.shape or str(got.dtype) != dtype:
        received = f"got {got.dtype} {got.shape}, expected {dtype} {want.shape}"
        return Verdict(quantity, np.inf, np.inf, False, f"{quantity}: {received}")
    difference = np.abs(got.astype(np.float64) - want)
    if not np.isfinite(difference).all():
        where = "" if quantity != "loss" else f" from step {int(np.argmin(np.isfinite(difference)))} on"
        return Verdict(quantity, np.inf, np.inf, False, f"{quantity}: NaN or infinity{where}")
    ratios = difference / floors
    worst = int(ratios.argmax())
    error, ratio = float(difference.max()), float(ratios.max())
    message = ""
    if ratio > FACTOR:
        where = f" at step {worst}" if quantity == "loss" else " after the last step"
        message = (
            f"{quantity}: the error{where} is {ratio:.3g} × the noise of the float64 trajectory, "
            f"at most {FACTOR:g} × is allowed"
        )
    elif error > cap:
        message = f"{quantity}: error {error:.2g} is above the hard cap of {cap:.2g}"
    return Verdict(quantity, error, ratio, not message, message)


@cache
def _noise(case: Case, seed: int) -> Trajectory:
    """The training of the spec in float32."""
    return spec_trained(case, problem(case, seed), "float32")
