"""A foreign attention layer of a PyTorch model: its tensors, its outputs and gradients, and its replacement."""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from selfattn_core.arrays import Array
from selfattn_core.params import parameter_table
from selfattn_core.porting.dialects.dialect import Dialect
from selfattn_core.porting.dialects.kernel_axes import to_matrix
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.networks.conversion import (
    ConvertedLayer,
    Foreign,
    Question,
)
from selfattn_core.porting.networks.foreign_layer import ForeignLayerBase, Options, notes_of
from selfattn_core.porting.report import listed
from selfattn_torch.converting.tensors import detached, read, tensors_of
from selfattn_torch.layer import SelfAttention2d
from selfattn_torch.weights import from_canonical, make, to_canonical
from selfattn_torch.with_map import SelfAttention2dWithMap

__all__ = ["ForeignLayer"]


@dataclass(frozen=True)
class _Answers:
    """The answers of the foreign layer to one question.

    Args:
        asked: the question.
        found: y, the map and the gradients, in the shapes of the definition.
        moved: keys of the layer's tensors that the call changed.
        pair: whether the layer returned (y, A).
        map_shape: shape of A as the layer returned it.
    """

    asked: Question
    found: Mapping[str, Array]
    moved: list[str]
    pair: bool
    map_shape: tuple[int, ...]


class ForeignLayer(ForeignLayerBase[SelfAttention2d]):
    """One module to be replaced.

    Args:
        layer: the module.
        names: names of all its places in the model.
        options: options of the conversion.
    """

    def __init__(self, layer: nn.Module, names: tuple[str, ...], options: Options) -> None:
        super().__init__(layer, names, options)
        self.tensors = tensors_of(layer, names[0])
        self.probe = _probe(layer)

    def _twin(self, dialect: Dialect) -> tuple[SelfAttention2d, ConvertedLayer]:
        foreign = self._read(self.tensors, dialect)
        probed = self._read(tensors_of(self.probe, self.names[0]), dialect)
        seen: list[_Answers] = []

        def answers(asked: Question) -> tuple[Mapping[str, Array], Mapping[str, Array]]:
            theirs = self._ask(probed, asked, training=False)
            twin = from_canonical(probed.config, asked.params, block_size=self.options.block_size).eval()
            seen.append(theirs)
            return theirs.found, _answers(twin, asked, pair=theirs.pair)

        old_floors, new_floors, failures, notes = self._compared(probed, answers)
        pair = seen[0].pair
        keep = pair and self.options.returns == "same"
        new, more = self._dressed(foreign, pair=keep, dropped_map=pair and not keep)
        notes += more
        if moved := seen[0].moved:
            notes.append(
                f"the old layer moves its {listed(moved, 3)} in evaluation too; the new one changes nothing in evaluation"
            )
        if seen[0].map_shape != seen[0].found.get("map", np.zeros(0)).shape and pair:
            notes.append(f"the old map had the shape {seen[0].map_shape}, and the new one has (B, N, M)")
        if extra := _further_arguments(self.layer):
            notes.append(
                f"the old layer also takes {', '.join(extra)}; the new one does not, so change the code that passes them"
            )
        failure, note = self._in_training(probed, seen[0])
        failures += (failure,) * bool(failure)
        notes += [note] * bool(note)
        report = ConvertedLayer(
            self.names,
            type(self.layer).__name__,
            dialect.name,
            foreign.config.to_dict(),
            old_floors,
            new_floors,
            failures,
            returns_map=isinstance(new, SelfAttention2dWithMap),
            assumptions=foreign.assumptions,
            notes=(*foreign.notes, *notes),
        )
        return new, report

    def _in_training(self, foreign: Foreign, evaluated: "_Answers") -> tuple[str, str]:
        """A failure and a note from comparing both layers in training, where a moving spectral norm has no definition."""
        asked = evaluated.asked
        theirs = self._ask(foreign, asked, training=True)
        if theirs.pair != evaluated.pair:
            return "it returns y in one mode and (y, A) in the other: training and evaluation differ", ""
        twin = from_canonical(foreign.config, asked.params, block_size=self.options.block_size).train()
        ours = _positions(twin(_maps(asked.x)))
        return self._differs_in_training(foreign, asked, theirs.found["y"], ours)

    def _ask(self, foreign: Foreign, asked: Question, *, training: bool) -> "_Answers":
        """The answers of a copy of the probe, because a call may move its state."""
        old = copy.deepcopy(self.probe, detached(self.probe)).train(training)
        before = {key: tensor.clone() for key, tensor in old.state_dict().items()}
        x = _maps(asked.x).requires_grad_()
        parameters = dict(old.named_parameters())
        for parameter in parameters.values():
            parameter.requires_grad_(True).grad = None
        try:
            result = old(x)
            pair = isinstance(result, tuple | list) and len(result) == 2
            y = result[0] if pair else result
            if not isinstance(y, torch.Tensor) or y.shape != x.shape:
                raise PortError(
                    f"{self.where}: returned {_shown(result)} for an input {tuple(x.shape)}; expected y of the same shape, or "
                    "(y, A)."
                )
            y.backward(_maps(asked.dy))
        except PortError:
            raise
        except Exception as error:
            raise self._does_not_run(tuple(x.shape), f"{type(error).__name__}: {error}") from error
        found = {"y": _positions(y), "x": _positions(x.grad)}
        if pair:
            if not isinstance(result[1], torch.Tensor):
                raise PortError(f"{self.where}: returned {_shown(result)}; expected y, or y and its map.")
            found["map"] = self._map(read(result[1]), foreign, asked)
        for name in parameter_table(foreign.config):
            gradient = getattr(parameters.get(foreign.source(name)), "grad", None)
            if gradient is not None:
                found[name] = _canonical(read(gradient), name, foreign.axes.get(name, ""))
        moved = [key for key, tensor in old.state_dict().items() if not torch.equal(tensor, before[key])]
        shape = tuple(result[1].shape) if pair else ()
        return _Answers(asked, found, moved, pair, shape)

    def _dressed(
        self, foreign: Foreign, *, pair: bool, dropped_map: bool
    ) -> tuple[SelfAttention2d, list[str]]:
        """Our layer with everything from the old one, and the notes about it."""
        state = self.layer.state_dict(keep_vars=True)
        like = next(state[origin.sources[0]] for origin in foreign.origins.values() if origin.sources)
        kind = SelfAttention2dWithMap if pair else SelfAttention2d
        made = {"block_size": self.options.block_size, "device": like.device, "dtype": like.dtype}
        new = make(kind, foreign.config, foreign.params, **made)
        for name, parameter in new.named_parameters():
            sources = foreign.origins[name.replace("weight", "kernel")].sources
            parameter.requires_grad_(any(getattr(state[key], "requires_grad", False) for key in sources))
        notes = notes_of(foreign, to_canonical(new), dropped_map=dropped_map)
        return new.train(self.layer.training), notes


def _further_arguments(layer: nn.Module) -> list[str]:
    _, *further = inspect.signature(layer.forward).parameters.values()
    return [str(each) for each in further]


def _probe(layer: nn.Module) -> nn.Module:
    """A copy for the comparison, on the CPU, in at least float32, without parameters that are zero.

    A gamma of 0, or a last kernel or batch norm that starts at zero, would hide everything else that the layer computes.
    """
    probe = copy.deepcopy(layer, detached(layer))
    double = any(parameter.dtype == torch.float64 for parameter in layer.parameters())
    probe = probe.to(device="cpu", dtype=torch.float64 if double else torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in probe.parameters():
            if not parameter.any():
                parameter.copy_(0.7 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return probe


def _canonical(gradient: Array, name: str, axes: str) -> Array:
    """A gradient in the canonical form of its parameter."""
    return to_matrix(gradient, axes) if name.endswith("kernel") else gradient.reshape(-1)


def _answers(twin: SelfAttention2d, asked: Question, *, pair: bool) -> dict[str, Array]:
    x = _maps(asked.x).requires_grad_()
    y = twin(x)
    y.backward(_maps(asked.dy))
    found = {"y": _positions(y), "x": _positions(x.grad)}
    if pair:
        found["map"] = read(twin(x, need_weights=True)[1])
    for name, parameter in twin.named_parameters():
        canonical = name.replace("weight", "kernel")
        found[canonical] = _canonical(read(parameter.grad), canonical, "OIHW")
    return found


def _maps(array: Array) -> torch.Tensor:
    return torch.from_numpy(np.array(array.transpose(0, 3, 1, 2), order="C"))


def _positions(maps: torch.Tensor | None) -> Array:
    assert maps is not None  # noqa: S101 - backward has set this gradient
    return read(maps).transpose(0, 2, 3, 1)


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"({', '.join(_shown(each) for each in value)})"
    return f"a {type(value).__name__}"
