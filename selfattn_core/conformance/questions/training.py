"""The training of a backend and of the definition: equal weights and batches, 200 optimiser steps.

A student learns the maps of a teacher, a layer of the same kind with other weights:

    loss = ½ · mean over batch and positions of ‖y − target‖²        ḡ = (y − target) / (B·H·W)

Objective and optimisers are in numpy. A backend only computes y and the gradients, so that the case tests nothing but its
layer. The gradient of the key bias is only noise, and Adam turns noise into steps. As the key bias has no effect on y, it
is trained but not compared.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from selfattn_core import spec
from selfattn_core.arrays import Array
from selfattn_core.conformance.cases.case import Case
from selfattn_core.conformance.cases.inputs import clear_windows, inputs
from selfattn_core.conformance.protocol import Backend, Build
from selfattn_core.conformance.questions.optimizers import OPTIMIZERS, Optimizer
from selfattn_core.params import parameter_table

__all__ = [
    "BATCHES",
    "STEPS",
    "Problem",
    "Trajectory",
    "follow",
    "problem",
    "quantities",
    "reference",
    "spec_trained",
    "train",
    "trained",
]

Params = Mapping[str, Array]
Answers = Callable[[Params, Array], Array]

STEPS = 200
BATCHES = 8
"""The number of batches. The steps use them in turn."""

_CLEAR = 3e-5
"""The least lead of the largest value in a pooling window, at every step. Float32 trajectories differ by about 1e-6."""

_UNCOMPARED = ("key.bias",)


@dataclass(frozen=True)
class Problem:
    """A training problem, in float64 arrays whose values float32 can represent.

    Args:
        start: the initial weights.
        x: feature maps (BATCHES, B, H, W, C).
        target: the answers of the teacher, shaped like `x`.
    """

    start: Params
    x: Array
    target: Array


@dataclass(frozen=True)
class Trajectory:
    """The course of a training.

    Args:
        losses: the loss before each step, (STEPS,), float64.
        params: the weights after the last step.
    """

    losses: Array
    params: Params


def problem(case: Case, seed: int = 0) -> Problem:
    """The problem of a training case. Equal arguments give equal bits.

    Args:
        case: a case of the family "trajectory".
        seed: another seed gives another draw of the same design.

    Returns:
        A problem in whose float64 trajectory rounding decides no pooling window at any step.
    """
    return _drawn(case, seed)[0]


@cache
def reference(case: Case, seed: int = 0) -> Trajectory:
    """The trajectory of the float64 spec.

    Args:
        case: a case of the family "trajectory".
        seed: as for `problem`.
    """
    return _drawn(case, seed)[1]


def follow(
    given: Problem, optimizer: Optimizer, dtype: str, forward: Answers, vjp: Callable[..., Params]
) -> Trajectory:
    """Train for `STEPS` steps.

    Args:
        given: the problem.
        optimizer: a new optimiser.
        dtype: the dtype of weights, feature maps and gradients. The loss is float64.
        forward: computes y from (params, x).
        vjp: computes the gradients by name from (params, x, dy).
    """
    params = {name: value.astype(dtype) for name, value in given.start.items()}
    losses = []
    for step in range(STEPS):
        x = given.x[step % BATCHES].astype(dtype)
        difference = np.asarray(forward(params, x)).astype(np.float64) - given.target[step % BATCHES]
        positions = difference.size // difference.shape[-1]
        losses.append(float(np.sum(difference**2)) / (2 * positions))
        params = optimizer.step(params, vjp(params, x, (difference / positions).astype(dtype)))
    return Trajectory(np.array(losses), params)


def train(
    backend: Backend,
    case: Case,
    dtype: str,
    layout: str,
    seed: int = 0,
    *,
    build: Build | None = None,
) -> dict[str, Array]:
    """Train a backend's layer.

    Args:
        backend: the backend. With a method `update` it keeps one layer, without one it builds a layer for each step.
        case: a case of the family "trajectory".
        dtype: "float32" or "float64".
        layout: the layout of the feature maps.
        seed: as for `problem`.
        build: builds the layers in place of `Backend.build`.

    Returns:
        "loss" (STEPS,), and the final weights by canonical name, without the key bias.
    """
    given = problem(case, seed)
    model: Any = None
    weights: Params = {}

    def ready(params: Params) -> Any:
        nonlocal model, weights
        if params is not weights:
            update = getattr(backend, "update", None)
            if model is not None and update is not None:
                model = update(model, params)
            else:
                model = (build or backend.build)(case.config, params, dtype, layout)
            weights = params
        return model

    # The report shows an overflow in the curve, so that NumPy's warnings would add nothing.
    with np.errstate(all="ignore"):
        found = follow(
            given,
            OPTIMIZERS[case.optimizer](),
            dtype,
            lambda params, x: backend.forward(ready(params), x),
            lambda params, x, dy: _fitting(params, backend.vjp(ready(params), x, dy)),
        )
    return quantities(case, found)


def trained(case: Case) -> tuple[str, ...]:
    """The names that `train` returns for a case: the loss and the compared weights.

    Example:
        >>> from selfattn_core.conformance.cases.table import CASES
        >>> trained(next(case for case in CASES if case.id == "SA-TRN-003"))
        ('loss', 'query.kernel', 'key.kernel', 'value.kernel', 'out.kernel', 'gamma')
    """
    return ("loss", *(name for name in parameter_table(case.config) if name not in _UNCOMPARED))


def _fitting(params: Params, gradients: Params) -> Params:
    """The gradients. Raise if a shape is wrong or one is missing, because numpy would broadcast a wrong shape."""
    problems = [f"{name} is missing" for name in params if name not in gradients]
    problems += [
        f"{name} is {np.shape(gradients[name])}, should be {value.shape}"
        for name, value in params.items()
        if name in gradients and np.shape(gradients[name]) != value.shape
    ]
    if problems:
        raise ValueError(f"vjp: {'; '.join(problems)}.")
    return gradients


def quantities(case: Case, found: Trajectory) -> dict[str, Array]:
    """The compared quantities of a trajectory, by name.

    Args:
        case: a case of the family "trajectory".
        found: its trajectory.
    """
    return {"loss": found.losses} | {name: found.params[name] for name in trained(case)[1:]}


def spec_trained(
    case: Case, given: Problem, dtype: str, vjp: Callable[..., Params] | None = None
) -> Trajectory:
    """The trajectory of the spec.

    Args:
        case: a case of the family "trajectory".
        given: its problem.
        dtype: the dtype to compute in.
        vjp: computes gradients from (params, x, dy), in place of `spec.vjp`.
    """
    return follow(
        given,
        OPTIMIZERS[case.optimizer](),
        dtype,
        lambda params, x: spec.forward(case.config, params, x),
        vjp or (lambda params, x, dy: spec.vjp(case.config, params, x, dy)),
    )


@cache
def _drawn(case: Case, seed: int) -> tuple[Problem, Trajectory]:
    for attempt in range(200):
        given = _draw(case, seed, attempt)
        clear = True

        def watched(params: Params, x: Array, dy: Array) -> Params:
            nonlocal clear
            clear = clear and clear_windows(case.config, params, x, _CLEAR)
            return spec.vjp(case.config, params, x, dy)

        trajectory = spec_trained(case, given, "float64", watched)
        if clear:
            return given, trajectory
    raise AssertionError(f"{case.id}: none of 200 draws has clear winners in all pooling windows.")


def _draw(case: Case, seed: int, attempt: int) -> Problem:
    batch, height, width = case.shape
    student = replace(case, id=f"{case.id} student {attempt}", shape=(BATCHES * batch, height, width))
    teacher = replace(case, id=f"{case.id} teacher {attempt}")
    given = inputs(student, "float32", seed)
    wide = {name: value.astype(np.float64) for name, value in given.params.items()}
    x = given.x.astype(np.float64).reshape(BATCHES, *case.shape, case.config.channels)
    taught = {
        name: value.astype(np.float64) for name, value in inputs(teacher, "float32", seed).params.items()
    }
    target = np.stack([spec.forward(case.config, taught, maps) for maps in x])
    return Problem(wide, x, target.astype(np.float32).astype(np.float64))
