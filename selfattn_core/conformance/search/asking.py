"""Asking a backend the steps of a probe, and watching what it must leave alone."""

import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from selfattn_core.arrays import Array, widen
from selfattn_core.conformance.execution.in_process import malformed
from selfattn_core.conformance.questions.ask import permutation
from selfattn_core.conformance.questions.views import viewed
from selfattn_core.conformance.search.material import Material, material
from selfattn_core.conformance.search.probe import Probe, Step

__all__ = ["LARGEST_ANSWER", "Answers", "MalformedError", "Touched", "ask_steps"]

_OFTEN = 2100
_UPDATES = 1000
_IN_THREADS = 100

LARGEST_ANSWER = 2**28
"""The most bytes of one answer that are kept. A right answer of the search is far smaller."""


class MalformedError(Exception):
    """An answer that cannot be compared with numbers."""


@dataclass(frozen=True)
class Touched:
    """Something that a backend changed and must not change.

    Args:
        what: "argument", "earlier answer" or "weights of the layer".
        step: the index of the step that was asked.
        name: the name of the array.
    """

    what: str
    step: int
    name: str


@dataclass
class Answers:
    """The answers to a probe.

    Args:
        steps: for each step its answers by name.
        touched: what the backend changed.
    """

    steps: list[dict[str, Array]] = field(default_factory=list)
    touched: list[Touched] = field(default_factory=list)


def ask_steps(backend: Any, probe: Probe) -> Answers:
    """The answers of a backend to the steps of a probe, in order.

    Args:
        backend: a backend that claims what the steps need.
        probe: the probe.

    Raises:
        MalformedError: if an answer is not a mapping of names to arrays of numbers, or is far too large.
    """
    # The kit measures what an overflow gives.
    with np.errstate(all="ignore"):
        return _Conversation(backend, probe).answers()


class _Conversation:
    def __init__(self, backend: Any, probe: Probe) -> None:
        self.backend, self.probe = backend, probe
        self.numbers = material(probe)
        self.models: dict[int, Any] = {}
        self.compiled: dict[int, Any] = {}
        # The arrays that the backend gave, each with a copy of its numbers at that time.
        self.given: list[tuple[int, str, Array, Array]] = []

    def answers(self) -> Answers:
        found = Answers()
        for index, step in enumerate(self.probe.steps):
            arguments = _Arguments(self.probe, self.numbers, step)
            answer = self._ask(step, arguments)
            kept = self._checked(step, answer)
            found.touched += [Touched("argument", index, name) for name in arguments.changed()]
            found.steps.append({name: array.copy() for name, array in kept.items()})
            self.given += [(index, name, array, array.copy()) for name, array in kept.items()]
            if step.ask == "params":
                found.touched += self._scribble(index, step, kept)
        for index, name, array, copy in self.given:
            if not _same(array, copy):
                found.touched.append(Touched("earlier answer", index, name))
        return found

    def _ask(self, step: Step, arguments: "_Arguments") -> Any:
        at = _layer_of(step)
        if step.ask in ("saved", "updated"):
            self._replace(step, at)
            return {}
        if step.ask in ("vjp", "per_sample", "training_vjp", "compiled_vjp", "mixed", "r1"):
            return self._derivatives(step, at, arguments)
        if step.ask == "params":
            return self.backend.params(self._model(at))
        if step.ask == "training_pass":
            self.compiled.pop(at, None)
            return self.backend.training_pass(self._model(at), arguments.x)
        return dict(self._values(step, arguments))

    def _replace(self, step: Step, at: int) -> None:
        """Save and load the layer, or give it the weights of the other layer."""
        model = self._model(at)
        self.compiled.pop(at, None)
        if step.ask == "updated":
            self.models[at] = self.backend.update(model, self._shuffled(self.numbers.layers[1 - at]))
            return
        with tempfile.TemporaryDirectory(prefix="selfattn-search-") as folder:
            self.models[at] = self.backend.saved(model, folder)

    def _derivatives(self, step: Step, at: int, arguments: "_Arguments") -> Any:
        backend, x, dy = self.backend, arguments.x, arguments.dy
        match step.ask:
            case "r1":
                value, gradients = backend.r1(self._model(at), x, dy)
                return {"r1": np.array(value, np.float64), **gradients}
            case "mixed":
                return backend.vjp_of_vjp(self._model(at), x, dy, arguments.cotangents)
            case "compiled_vjp":
                return backend.vjp(self._compiled(at), x, dy)
            case "per_sample":
                return backend.per_sample_vjp(self._model(at), x, dy)
            case "training_vjp":
                return backend.training_vjp(self._model(at), x, dy)
        return backend.vjp(self._model(at), x, dy)

    def _values(self, step: Step, arguments: "_Arguments") -> Iterator[tuple[str, Any]]:
        backend, x = self.backend, arguments.x
        compiled = step.ask == "compiled_forward"
        model = (self._compiled if compiled else self._model)(_layer_of(step))
        match step.ask:
            case "forward" | "compiled_forward":
                yield "y", backend.forward(model, x)
            case "map":
                yield "map", backend.attention_map(model, x)
            case "alone":
                yield "y", backend.forward(model, x[-1:])
            case "refilled":
                x = np.array(x)
                backend.forward(model, x)
                x[...] = self.numbers.refilled
                yield "y", backend.forward(model, x)
            case "often":
                yield "y", _furthest([_array(backend.forward(model, x)) for _ in range(_OFTEN)])
            case "together":
                yield "y", _furthest(self._in_threads(model, x, arguments.other_x))
            case "worn":
                yield "y", backend.forward(self._worn(_layer_of(step)), x)
            case "permuted":
                batch, height, width, channels = x.shape
                order = permutation(height * width)
                flat = (batch, height * width, channels)
                y = _array(backend.forward(model, np.array(x).reshape(flat)[:, order].reshape(x.shape)))
                if y.shape == x.shape:
                    y = y.reshape(flat)[:, np.argsort(order)].reshape(x.shape)
                yield "y", y
            case _:
                other = backend.build(
                    self.probe.config,
                    self._shuffled(changed_weights(step.ask, self.numbers.layers[_layer_of(step)])),
                    self.probe.dtype,
                    self.probe.layout,
                )
                yield "y", backend.forward(other, x)

    def _in_threads(self, model: Any, x: Array, other: Array) -> list[Array]:
        """The answers of `forward` for x, while another thread calls it for the other input."""
        ready = threading.Barrier(2)

        def call(argument: Array) -> list[Array]:
            ready.wait()
            return [_array(self.backend.forward(model, argument)).copy() for _ in range(_IN_THREADS)]

        interval = sys.getswitchinterval()
        # Python exchanges its threads every 5 ms, in which a small layer has answered many times.
        sys.setswitchinterval(1e-5)
        try:
            with ThreadPoolExecutor(2) as threads:
                own, _ = (threads.submit(call, argument) for argument in (x, other))
                return own.result()
        finally:
            sys.setswitchinterval(interval)

    def _worn(self, at: int) -> Any:
        """The layer after many updates."""
        self.compiled.pop(at, None)
        for _ in range(_UPDATES // 2):
            for source in (1 - at, at):
                weights = self._shuffled(self.numbers.layers[source])
                self.models[at] = self.backend.update(self._model(at), weights)
        return self._model(at)

    def _model(self, at: int) -> Any:
        if at not in self.models:
            weights = self._shuffled(self.numbers.layers[at])
            self.models[at] = self.backend.build(
                self.probe.config, weights, self.probe.dtype, self.probe.layout
            )
        return self.models[at]

    def _compiled(self, at: int) -> Any:
        if at not in self.compiled:
            self.compiled[at] = self.backend.compiled(self._model(at))
        return self.compiled[at]

    def _shuffled(self, weights: Mapping[str, Array]) -> dict[str, Array]:
        """Copies in an order that is not that of the table: weights have names."""
        names = sorted(weights, key=lambda name: name[::-1])
        return {name: weights[name].copy() for name in names}

    def _checked(self, step: Step, answer: Any) -> dict[str, Array]:
        if problem := malformed(answer):
            raise MalformedError(f"{step.words}: {problem}")
        sizes = {name: np.asarray(value).nbytes for name, value in answer.items()}
        if too_large := [name for name, size in sizes.items() if size > LARGEST_ANSWER]:
            shapes = ", ".join(f"{name} of shape {np.shape(answer[name])}" for name in too_large)
            raise MalformedError(f"{step.words}: got {shapes}, far more numbers than any right answer has")
        return {name: widen(np.asarray(value)) for name, value in answer.items()}

    def _scribble(self, index: int, step: Step, answer: Mapping[str, Array]) -> list[Touched]:
        """Overwrite the arrays that `params` gave. They belong to the caller, so the layer must keep its weights."""
        before = {name: array.copy() for name, array in answer.items()}
        for array in answer.values():
            if array.flags.writeable:
                array[...] = 7
        after = self.backend.params(self._model(_layer_of(step)))
        # What is compared at the end is what is there now.
        self.given = [row for row in self.given if row[0] != index]
        return [
            Touched("weights of the layer", index, name)
            for name, array in before.items()
            if name not in after or not _same(np.asarray(widen(np.asarray(after[name]))), array)
        ]


def changed_weights(ask: str, weights: Mapping[str, Array]) -> dict[str, Array]:
    """The weights of the steps "doubled" and "shifted".

    Args:
        ask: the step.
        weights: the weights of the layer.
    """
    changed = {name: array.copy() for name, array in weights.items()}
    if ask == "doubled":
        for name in ("value.kernel", "value.bias", "out.bias"):
            if name in changed:
                changed[name] = changed[name] * 2
    else:
        changed["key.bias"] = changed["key.bias"] + changed["key.bias"].dtype.type(2)
    return changed


class _Arguments:
    """The arrays that a step hands over, with copies that tell whether they were changed."""

    def __init__(self, probe: Probe, numbers: Material, step: Step) -> None:
        index = 1 if step.place == "input" else 0
        self.x = viewed(numbers.x[index], probe.x_view)
        self.other_x = viewed(numbers.x[1 - index], probe.x_view)
        self.dy = viewed(numbers.dy[index], probe.dy_view)
        own = numbers.cotangents[index]
        self.cotangents = {name: own[name].copy() for name in sorted(own, key=lambda name: name[::-1])}
        self._copies = {name: array.copy() for name, array in self._named().items()}

    def changed(self) -> list[str]:
        return [name for name, array in self._named().items() if not _same(array, self._copies[name])]

    def _named(self) -> dict[str, Array]:
        return {"x": self.x, "dy": self.dy} | {
            f"cotangent of {name}": array for name, array in self.cotangents.items()
        }


def _layer_of(step: Step) -> int:
    return 1 if step.place == "layer" else 0


def _same(left: Array, right: Array) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def _furthest(answers: list[Array]) -> Array:
    """The answer that differs most from the first."""
    first = answers[0]

    def distance(answer: Array) -> float:
        if answer.shape != first.shape or not np.array_equal(np.isnan(answer), np.isnan(first)):
            return np.inf
        apart = np.abs(answer.astype(np.float64) - first.astype(np.float64))
        return float(np.max(apart, initial=0.0, where=~np.isnan(apart)))

    return max(answers, key=distance)


def _array(answer: Any) -> Array:
    if not isinstance(answer, np.ndarray):
        raise MalformedError(f"forward returned {type(answer).__name__}, expected a numpy array")
    return answer
