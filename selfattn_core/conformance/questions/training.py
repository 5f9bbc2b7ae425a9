"""Training as a case: equal weights and batches, 200 optimiser steps.

A student learns the maps of a teacher, a layer of the same kind with other weights:

    loss = ½ · mean over batch and positions of ‖y − target‖²        ḡ = (y − target) / (B·H·W)

Objective and optimisers are numpy, the same for everybody; a backend gives y and the gradients, so that only its layer
counts. The key bias has no gradient but noise, which Adam turns into steps, and no effect: it is trained and left out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfattn_core import spec
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

Array = NDArray[Any]
Params = Mapping[str, Array]
Answers = Callable[[Params, Array], Array]

STEPS = 200
BATCHES = 8
"""Batches that the steps go through in turn."""

_CLEAR = 3e-5
"""By how much the largest value of a pooling window leads at every step; float32 trajectories part by about 1e-6."""

_UNCOMPARED = ("key.bias",)


@dataclass(frozen=True)
class Problem:
    """What is learned, in float64 arrays whose values float32 can hold.

    Args:
        start: the weights at first.
        x: maps (BATCHES, B, H, W, C).
        target: the teacher's answers to them.
    """

    start: Params
    x: Array
    target: Array


@dataclass(frozen=True)
class Trajectory:
    """How a training went.

    Args:
        losses: before each step, (STEPS,), float64.
        params: the weights after the last step.
    """

    losses: Array
    params: Params


def problem(case: Case, seed: int = 0) -> Problem:
    """The problem of a training case: equal arguments give equal bits.

    Args:
        case: of the family "trajectory".
        seed: other seeds give other draws of the same design.

    Returns:
        A problem on whose float64 trajectory no pooling window is decided by rounding at any step.
    """
    return _drawn(case, seed)[0]


@cache
def reference(case: Case, seed: int = 0) -> Trajectory:
    """The trajectory of the float64 spec.

    Args:
        case: of the family "trajectory".
        seed: as for `problem`.
    """
    return _drawn(case, seed)[1]


def follow(
    given: Problem, optimizer: Optimizer, dtype: str, forward: Answers, vjp: Callable[..., Params]
) -> Trajectory:
    """Train for `STEPS` steps.

    Args:
        given: what.
        optimizer: a new one.
        dtype: of weights, maps and gradients; the loss is float64.
        forward: (params, x) to y.
        vjp: (params, x, dy) to the gradients by name.
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
        backend: which; with a method `update` it keeps one layer, without one it builds a layer for each step.
        case: of the family "trajectory".
        dtype: "float32" or "float64".
        layout: of its maps.
        seed: as for `problem`.
        build: makes its layers in place of `Backend.build`.

    Returns:
        "loss" (STEPS,), and the final weights by canonical name, less the key bias.
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

    # NumPy's warnings of an overflow say less than the report of the curve does.
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
    """What `train` returns for a case: the curve and the weights that are compared.

    Example:
        >>> from selfattn_core.conformance.cases.table import CASES
        >>> trained(next(case for case in CASES if case.id == "SA-TRN-003"))
        ('loss', 'query.kernel', 'key.kernel', 'value.kernel', 'out.kernel', 'gamma')
    """
    return ("loss", *(name for name in parameter_table(case.config) if name not in _UNCOMPARED))


def _fitting(params: Params, gradients: Params) -> Params:
    """The gradients, if there is one of the right shape for each parameter: numpy would broadcast a wrong one."""
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
    """What of a trajectory is compared, by name.

    Args:
        case: of the family "trajectory".
        found: its trajectory.
    """
    return {"loss": found.losses} | {name: found.params[name] for name in trained(case)[1:]}


def spec_trained(
    case: Case, given: Problem, dtype: str, vjp: Callable[..., Params] | None = None
) -> Trajectory:
    """The trajectory of the spec.

    Args:
        case: of the family "trajectory".
        given: its problem.
        dtype: to compute in.
        vjp: in place of the spec's, (params, x, dy) to gradients.
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
    raise AssertionError(f"{case.id}: no draw in 200 had clear winners in all its pooling windows.")


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
