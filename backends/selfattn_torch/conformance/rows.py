"""The PyTorch layer on some rows in each of several processes, as a backend of the conformance kit.

The backend's own process computes nothing. It hands the whole arrays to the processes of a group. Each takes its rows,
computes as `TorchBackend` does, and returns its rows and its shares of the gradients of parameters.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from selfattn_core import SelfAttentionConfig
from selfattn_core.arrays import Array
from selfattn_torch.conformance.backend import TorchBackend
from selfattn_torch.conformance.model import Model
from selfattn_torch.conformance.ranks import Ranks
from selfattn_torch.parallel import attend_rows, check_replicas
from selfattn_torch.parallel.rows import KV

__all__ = ["RankBackend", "RowsBackend", "heights_of", "streaming"]

DEFAULT_PROCESSES = 4
"""Enough for a process between others, and for processes without rows."""


def heights_of(height: int, count: int) -> tuple[int, ...]:
    """The rows of each process. The last ones have one more, so that borders cut windows, and the first may have none.

    Example:
        >>> heights_of(7, 4), heights_of(3, 4)
        ((1, 2, 2, 2), (0, 1, 1, 1))
    """
    return tuple(height // count + (rank >= count - height % count) for rank in range(count))


@dataclass(frozen=True)
class _RowsModel(Model):
    """A layer that takes the rows of this process from the maps that it is given."""

    def given(self, x: Array) -> torch.Tensor:
        """The rows of this process of the maps (B, H, W, C)."""
        return super().given(_own(x))


class RankBackend(TorchBackend):
    """What one process of the group does. Maps that it returns have its rows, and gradients of parameters are its shares.

    Args:
        kv: as in `attend_rows`.
    """

    def __init__(self, kv: KV = "gather") -> None:
        super().__init__()
        self.kv = kv
        self.models: dict[int, Model] = {}

    def built(
        self, number: int, config: SelfAttentionConfig, params: Mapping[str, Array], dtype: str, layout: str
    ) -> None:
        """Build the model of a number."""
        model = super().build(config, params, dtype, layout)
        call = partial(attend_rows, model.layer, kv=self.kv)
        self.models[number] = _RowsModel(model.layer, call, model.memory_format)

    def dropped(self, numbers: list[int]) -> None:
        """Forget models."""
        for number in numbers:
            del self.models[number]

    def asked(self, method: str, number: int, *arguments: Any) -> Any:
        """The answer of a method of `TorchBackend` for the model of a number."""
        answer = getattr(self, method)(self.models[number], *arguments)
        # Such as u and v, which every process moves for itself.
        check_replicas(self.models[number].layer)
        return None if isinstance(answer, Model) else answer

    def vjp_of_vjp(
        self, model: Model, x: Array, dy: Array, cotangents: Mapping[str, Array]
    ) -> Mapping[str, Array]:
        """Second derivatives, with the rows of this process of the cotangent of x."""
        own = {name: _own(array) if name == "x" else array for name, array in cotangents.items()}
        return super().vjp_of_vjp(model, x, dy, own)


class RowsBackend:
    """`selfattn_torch.parallel.attend_rows` over several processes.

    Args:
        make: makes what each process computes with.
    """

    name = "torch-rows"

    def __init__(self, make: Callable[[], RankBackend] = RankBackend) -> None:
        self.make = make
        self.count = DEFAULT_PROCESSES
        self._ranks: Ranks | None = None
        self._number = 0
        self._unused: list[int] = []

    def versions(self) -> Mapping[str, str]:
        """The version of torch, and the number of processes."""
        return {"torch": torch.__version__, "processes": str(self.count)}

    def claims(self) -> frozenset[str]:
        """Everything that the level `gan` asks for, and spectral norm."""
        return frozenset(
            {"forward", "map", "vjp", "params", "init", "spectral_norm", "training_vjp", "r1", "mixed"}
        )

    def layouts(self) -> tuple[str, ...]:
        """Both memory formats."""
        return ("channels_first", "channels_last")

    @contextmanager
    def over(self, processes: int | None) -> Iterator[None]:
        """Compute over this number of processes inside a `with` block, and end them at its end.

        Args:
            processes: their number, or None for 4.
        """
        self.count = processes or DEFAULT_PROCESSES
        try:
            yield
        finally:
            self._close()

    def build(
        self, config: SelfAttentionConfig, params: Mapping[str, Array], dtype: str, layout: str
    ) -> "Everywhere":
        """The layer in every process."""
        if self._ranks is not None and self._unused:
            unused, self._unused = self._unused, []
            self._ask("dropped", unused)
        self._number += 1
        params = {name: np.array(array) for name, array in params.items()}
        self._ask("built", self._number, config, params, dtype, layout)
        model = Everywhere(self._number)
        weakref.finalize(model, self._unused.append, self._number)
        return model

    def update(self, model: "Everywhere", params: Mapping[str, Array]) -> "Everywhere":
        """The same layers, with other weights."""
        self._asked("update", model, dict(params))
        return model

    def forward(self, model: "Everywhere", x: Array) -> Array:
        """The rows of y of all processes."""
        return np.concatenate(self._asked("forward", model, x), 1)

    def attention_map(self, model: "Everywhere", x: Array) -> Array:
        """The rows of A of all processes."""
        return np.concatenate(self._asked("attention_map", model, x), 1)

    def vjp(self, model: "Everywhere", x: Array, dy: Array) -> Mapping[str, Array]:
        """The gradient of the sum of the losses of all processes."""
        return _together(self._asked("vjp", model, x, dy))

    def training_vjp(self, model: "Everywhere", x: Array, dy: Array) -> Mapping[str, Array]:
        """The same in training mode."""
        return _together(self._asked("training_vjp", model, x, dy))

    def r1(self, model: "Everywhere", x: Array, w: Array) -> tuple[float, Mapping[str, Array]]:
        """The sum of the squares of all processes, and its gradient."""
        values, gradients = zip(*self._asked("r1", model, x, w), strict=True)
        return float(sum(values)), _together(gradients)

    def vjp_of_vjp(
        self, model: "Everywhere", x: Array, dy: Array, cotangents: Mapping[str, Array]
    ) -> Mapping[str, Array]:
        """Second derivatives of the sum of the losses of all processes."""
        return _together(self._asked("vjp_of_vjp", model, x, dy, dict(cotangents)))

    def params(self, model: "Everywhere") -> Mapping[str, Array]:
        """The weights of the first process. `RankBackend` checks that those of the others are equal."""
        return self._asked("params", model)[0]

    def initial(self, config: SelfAttentionConfig, seed: int) -> Mapping[str, Array]:
        """A new layer."""
        return TorchBackend().initial(config, seed)

    def training_pass(self, model: "Everywhere", x: Array) -> Mapping[str, Array]:
        """The rows of y of all processes, and the state of the first."""
        answers = self._asked("training_pass", model, x)
        return answers[0] | {"y": np.concatenate([answer["y"] for answer in answers], 1)}

    def _asked(self, method: str, model: "Everywhere", *arguments: Any) -> list[Any]:
        # A pipe keeps the values of an array, and not its strides.
        return self._ask("asked", method, model.number, *arguments)

    def _ask(self, *message: Any) -> list[Any]:
        if self._ranks is None:
            self._ranks = Ranks(self.count, self.make)
        try:
            return self._ranks.ask(*message)
        except RuntimeError:
            self._ranks = None
            raise

    def _close(self) -> None:
        if self._ranks is not None:
            self._ranks.close()
        self._ranks = None
        self._unused.clear()


@dataclass(eq=False)
class Everywhere:
    """The models of this number in all processes."""

    number: int


def _own(maps: Array) -> Array:
    heights = heights_of(maps.shape[1], dist.get_world_size())
    start = sum(heights[: dist.get_rank()])
    return maps[:, start : start + heights[dist.get_rank()]]


def _together(shares: Any) -> dict[str, Array]:
    """Gradients of maps by rows, and those of parameters as sums."""
    return {
        name: np.concatenate([share[name] for share in shares], 1)
        if name in ("x", "dy")
        else np.sum([share[name] for share in shares], 0)
        for name in shares[0]
    }


def streaming() -> RowsBackend:
    """The same with `kv="stream"`."""
    return RowsBackend(partial(RankBackend, "stream"))
