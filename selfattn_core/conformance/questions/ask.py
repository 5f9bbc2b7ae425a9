"""The question that each family asks a backend. The answers of the reference are the expected values."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.conformance.cases.case import Case
from selfattn_core.conformance.cases.computations import ComputationName
from selfattn_core.conformance.cases.families import FamilyName
from selfattn_core.conformance.cases.inputs import Inputs
from selfattn_core.conformance.protocol import Backend, Build
from selfattn_core.conformance.questions.peak_memory import PeakUnknownError, peak_growth
from selfattn_core.conformance.questions.training import train
from selfattn_core.conformance.questions.views import viewed

__all__ = ["INITIAL_DRAWS", "answers", "permutation"]


INITIAL_DRAWS = 4
"""The number of new layers whose weights are compared with the distribution. The last one repeats the seed of the first."""


def answers(
    backend: Backend,
    case: Case,
    given: Inputs,
    dtype: str,
    layout: str,
    seed: int = 0,
    *,
    build: Build | None = None,
) -> Mapping[str, Any]:
    """The answers of a backend to a case, by quantity.

    Args:
        backend: a backend that claims the abilities that the case needs.
        case: the case.
        given: its input.
        dtype: the dtype to compute in.
        layout: the layout to compute in.
        seed: the seed of the input. Some families draw further values from it.
        build: builds the layers in place of `Backend.build`.

    Raises:
        PeakUnknownError: if the case is about memory, and this system or device cannot measure it.
    """

    def built() -> Any:
        return (build or backend.build)(case.config, given.params, dtype, layout)

    if case.view:
        given = replace(given, x=viewed(given.x, case.view), dy=viewed(given.dy, case.view))

    if case.computation == "trajectory":
        return train(backend, case, dtype, layout, seed, build=build)
    if case.computation == "init":
        seeds = [*range(1, INITIAL_DRAWS), 1]
        return {
            f"{draw}: {name}": array
            for draw, seed in enumerate(seeds)
            for name, array in backend.initial(case.config, seed).items()
        }
    if case.family == "determinism":
        model = built()
        return {
            "y": backend.forward(model, given.x),
            "again": backend.forward(model, given.x),
            "rebuilt": backend.forward(built(), given.x),
        }
    model = built()
    for _ in range(case.passes):
        backend.training_pass(model, given.other)
    return _BY_FAMILY.get(case.family, _computed)(backend, model, case, given)


def permutation(positions: int) -> Array:
    """An order of positions that no symmetry of a map gives: reversed, and rolled by seven.

    Args:
        positions: N.
    """
    return np.roll(np.arange(positions)[::-1], 7)


def _computed(backend: Backend, model: Any, case: Case, given: Inputs) -> Mapping[str, Any]:
    return _BY_COMPUTATION[case.computation](backend, model, case, given)


def _r1(backend: Backend, model: Any, _: Case, given: Inputs) -> Mapping[str, Any]:
    value, gradients = backend.r1(model, given.x, given.dy)
    return {"r1": np.array(value, np.float64), **gradients}


def _sizes(backend: Backend, model: Any, _: Case, given: Inputs) -> Mapping[str, Any]:
    return {
        "y": backend.forward(model, given.x),
        "y of the other size": backend.forward(model, given.other),
        "y of another map": backend.forward(model, given.dy),
        "y again": backend.forward(model, given.x),
    }


def _batch(backend: Backend, model: Any, _: Case, given: Inputs) -> Mapping[str, Any]:
    exchanged = np.concatenate([given.other[:1] * given.x.dtype.type(50), given.x[1:]])
    return {
        "y of the rest": _array(backend.forward(model, exchanged))[1:],
        "y of one alone": backend.forward(model, given.x[1:2]),
    }


def _permutation(backend: Backend, model: Any, _: Case, given: Inputs) -> Mapping[str, Any]:
    batch, height, width, channels = given.x.shape
    order = permutation(height * width)
    permuted = given.x.reshape(batch, -1, channels)[:, order].reshape(given.x.shape)
    y = _array(backend.forward(model, permuted))
    back = y.reshape(batch, height * width, -1)[:, np.argsort(order)]
    return {"y": back.reshape(y.shape)}


def _nonfinite(backend: Backend, model: Any, case: Case, given: Inputs) -> Mapping[str, Any]:
    x = given.x.copy()
    if case.poison:
        x[case.poison[0]] = case.poison[1]
    return {"y": backend.forward(model, x)}


def _params(backend: Backend, model: Any, case: Case, given: Inputs) -> Mapping[str, Any]:
    if case.config.spectral_norm:
        # A forward pass in evaluation mode must not change the state.
        backend.forward(model, given.x)
    return backend.params(model)


def _evaluation(backend: Backend, model: Any, case: Case, given: Inputs) -> Mapping[str, Any]:
    y, gradients = backend.forward(model, given.x), backend.vjp(model, given.x, given.dy)
    if "map" in backend.claims():
        backend.attention_map(model, given.other)
    backend.vjp(model, given.other, given.x)
    if "r1" in case.needs:
        backend.r1(model, given.x, given.dy)
    again, y_again = backend.vjp(model, given.x, given.dy), backend.forward(model, given.x)
    # Later calls must not change earlier answers.
    backend.vjp(model, given.other, given.x)
    backend.forward(model, given.other)
    return {
        "y": y,
        "y again": y_again,
        **gradients,
        **{f"{name} again": gradient for name, gradient in again.items()},
        **{f"weight {name}": weight for name, weight in backend.params(model).items()},
        "argument x": given.x,
        "argument dy": given.dy,
    }


def _compiled(backend: Backend, model: Any, case: Case, given: Inputs) -> Mapping[str, Any]:
    if not case.eager:
        return _computed(backend, backend.compiled(model), case, given)
    eager = getattr(backend, "eager", None)
    return _computed(backend, model if eager is None else eager(model), case, given)


def _saved(backend: Backend, model: Any, _: Case, given: Inputs) -> Mapping[str, Any]:
    with tempfile.TemporaryDirectory(prefix="selfattn-saved-") as folder:
        loaded = backend.saved(model, folder)
        return {"y": backend.forward(loaded, given.x), **backend.params(loaded)}


def _memory(backend: Backend, model: Any, case: Case, given: Inputs) -> Mapping[str, Any]:
    found: dict[str, Any] = {}

    def call(maps: Inputs) -> None:
        found.update(_computed(backend, model, case, maps))

    peak = getattr(backend, "peak_memory", peak_growth)
    _require_counters(peak)
    # The first call also allocates memory for threads, libraries and compilers. The case does not count that.
    call(replace(given, x=given.x[:, :8, :9], dy=given.dy[:, :8, :9]))
    rise = peak(lambda: call(given))
    return {"bytes": np.array(rise), **found}


def _require_counters(peak: Callable[[Callable[[], None]], int]) -> None:
    """Raise `PeakUnknownError` before the work if this system or device cannot measure memory.

    `peak` then raises without calling its argument. If it did call it, the error only means that an earlier peak was
    higher than the peak of this empty call.
    """
    called = False

    def call() -> None:
        nonlocal called
        called = True

    try:
        peak(call)
    except PeakUnknownError:
        if not called:
            raise


def _shipped(backend: Backend, model: Any, case: Case, given: Inputs) -> Mapping[str, Any]:
    as_shipped = getattr(backend, "as_shipped", None)
    return _computed(backend, model if as_shipped is None else as_shipped(model), case, given)


_Question = Callable[[Backend, Any, Case, Inputs], Mapping[str, Any]]

_BY_COMPUTATION: Mapping[ComputationName, _Question] = {
    "forward": lambda backend, model, _, given: {"y": backend.forward(model, given.x)},
    "map": lambda backend, model, _, given: {"map": backend.attention_map(model, given.x)},
    "spectral_norm": lambda backend, model, _, given: backend.training_pass(model, given.x),
    "vjp": lambda backend, model, _, given: backend.vjp(model, given.x, given.dy),
    "training_vjp": lambda backend, model, _, given: backend.training_vjp(model, given.x, given.dy),
    "per_sample": lambda backend, model, _, given: backend.per_sample_vjp(model, given.x, given.dy),
    "evaluation": _evaluation,
    "r1": _r1,
    "mixed": lambda backend, model, _, given: backend.vjp_of_vjp(model, given.x, given.dy, given.cotangents),
    "params": _params,
    "saved": _saved,
}

_BY_FAMILY: Mapping[FamilyName, _Question] = {
    "sizes": _sizes,
    "batch": _batch,
    "permutation": _permutation,
    "nonfinite": _nonfinite,
    "compiled": _compiled,
    "memory": _memory,
    "shipped": _shipped,
}
"""The questions of the families that do more than the computation of their cases."""


def _array(answer: Any) -> Array:
    """An answer that will be indexed. Raise `TypeError` if it is not an array."""
    if not isinstance(answer, np.ndarray):
        raise TypeError(f"forward returned {type(answer).__name__}; expected a numpy array")
    return answer
