"""What each family asks of a backend. The reference is asked the same, and its answers are what is expected."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfattn_core.conformance.cases.case import Case
from selfattn_core.conformance.cases.computations import ComputationName
from selfattn_core.conformance.cases.families import FamilyName
from selfattn_core.conformance.cases.inputs import Inputs
from selfattn_core.conformance.protocol import Backend, Build
from selfattn_core.conformance.questions.peak_memory import PeakUnknownError, peak_growth
from selfattn_core.conformance.questions.training import train

__all__ = ["INITIAL_DRAWS", "answers"]

Array = NDArray[Any]

INITIAL_DRAWS = 4
"""New layers that are drawn to look at the distribution of their weights; the last repeats the first."""


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
    """What a backend says to a case, by quantity.

    Args:
        backend: which claims what the case needs.
        case: the case.
        given: its input.
        dtype: to compute in.
        layout: to compute in.
        seed: of the input, for the families that draw more than that.
        build: makes the layers in place of `Backend.build`.

    Raises:
        PeakUnknownError: if the case is about memory, which cannot be measured on this system or device.
    """

    def built() -> Any:
        return (build or backend.build)(case.config, given.params, dtype, layout)

    if case.view:
        given = replace(given, x=_view(case, given.x), dy=_view(case, given.dy))

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
    return _BY_FAMILY.get(case.family, _computed)(backend, built(), case, given)


def _view(case: Case, maps: Array) -> Array:
    """The same values, not contiguous."""
    if case.view == "transposed":
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(maps, 3, 1)), 1, 3)
    batch, height, width, channels = maps.shape
    between = np.zeros((batch, height, 2 * width, 2 * channels), maps.dtype)
    view = between[:, :, ::2, ::2]
    view[...] = maps
    return view


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
    # Seven positions on, with the last six first: no symmetry of the map is one of these.
    order = np.roll(np.arange(height * width)[::-1], 7)
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
        # An evaluation leaves the state where it is.
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
    # What has been answered is not to change with what is asked next.
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
    calls: Mapping[str, Callable[[Array, Array], Any]] = {
        "forward": lambda x, _: backend.forward(model, x),
        "vjp": lambda x, dy: backend.vjp(model, x, dy),
        "r1": lambda x, dy: backend.r1(model, x, dy),
    }
    call = calls[case.computation]
    peak = getattr(backend, "peak_memory", peak_growth)
    _require_counters(peak)
    # What threads, libraries and compilers take once is no part of the case.
    call(given.x[:, :8, :9], given.dy[:, :8, :9])
    return {"bytes": np.array(peak(lambda: call(given.x, given.dy)))}


def _require_counters(peak: Callable[[Callable[[], None]], int]) -> None:
    """Raise before the work where it would be for nothing: nothing is called where nothing counts.

    Where something does, the peak of no work may be unknown all the same, for an earlier one was higher.
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
"""Of the families that do more than compute what their cases say."""


def _array(answer: Any) -> Array:
    """A part of an answer is taken of arrays only; what else it may be, is told by its type."""
    if not isinstance(answer, np.ndarray):
        raise TypeError(f"forward returned {type(answer).__name__}; expected a numpy array")
    return answer
