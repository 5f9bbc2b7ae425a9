"""A foreign attention layer of an NNX model: its tensors, its outputs and gradients, and its replacement."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from selfattn_core.arrays import Array
from selfattn_core.params import parameter_table
from selfattn_core.porting.blocks.find import index_of
from selfattn_core.porting.blocks.match import prefixes
from selfattn_core.porting.dialects.dialect import Dialect
from selfattn_core.porting.dialects.kernel_axes import to_matrix
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats.tensors import Tensors
from selfattn_core.porting.networks.conversion import (
    ConvertedLayer,
    Foreign,
    Question,
)
from selfattn_core.porting.networks.foreign_layer import ForeignLayerBase, Options, notes_of
from selfattn_core.porting.report import listed
from selfattn_flax.converting.answers import (
    Answers,
    answered,
    arithmetic,
    at_path,
    dtype_of,
    probe_of,
    shown,
    trained,
)
from selfattn_flax.converting.places import copied
from selfattn_flax.converting.tensors import forms_of, leaves_of, read
from selfattn_flax.nnx.layer import SelfAttention2D
from selfattn_flax.nnx.weights import make, to_canonical
from selfattn_flax.nnx.with_map import SelfAttention2DWithMap
from selfattn_flax.spectral_norm import NNXSpectralConv

__all__ = ["ForeignLayer", "modes_of"]

KeyPath = tuple[Any, ...]
# Metadata that `nnx.Variable` sets itself.
_OF_EVERY_VARIABLE = ("hijax", "ref", "eager_sharding")


class ForeignLayer(ForeignLayerBase[SelfAttention2D]):
    """One module to be replaced.

    Args:
        layer: the module.
        names: names of all its places in the model.
        options: options of the conversion.
    """

    def __init__(self, layer: nnx.Module, names: tuple[str, ...], options: Options) -> None:
        super().__init__(layer, names, options)
        self.leaves = leaves_of(layer)
        self.tensors = forms_of(layer, names[0])[0]
        self.probe = probe_of(layer)

    def _form(self, layer: nnx.Module, dialect: Dialect) -> Tensors:
        """The layer's tensors, in the form whose keys are those of the dialect."""
        forms = forms_of(layer, self.names[0])
        return next((form for form in forms if "" in prefixes(dialect, index_of(form))), forms[0])

    def _twin(self, dialect: Dialect) -> tuple[SelfAttention2D, ConvertedLayer]:
        foreign, probed = (
            self._read(self._form(each, dialect), dialect) for each in (self.layer, self.probe)
        )
        every: list[tuple[Question, Answers]] = []

        def answers(asked: Question) -> tuple[dict[str, Array], dict[str, Array]]:
            with arithmetic(asked.x.dtype):
                old = self._ask(probed, asked)
                told = self._told(old, probed, asked)
                every.append((asked, old))
                twin = self._made(probed, asked, pair=old.map is not None)
                paths = {name: _own_path(name) for name in parameter_table(probed.config)}
                return told, _ours(answered(twin, asked, paths), probed)

        theirs, ours, failures, places = self._compared(probed, answers)
        asked, old = every[0]
        pair = old.map is not None
        if len({each.map is None for _, each in every}) > 1:
            failures = (*failures, "it returns (y, A) at some sizes of its input only")
        keep = pair and self.options.returns == "same"
        with arithmetic(asked.x.dtype):
            failure, training = self._in_training(probed, asked, old)
            new, notes = self._dressed(foreign, old, asked.x.shape[1:3], pair=keep)
        if keep and old.map.ndim != 3:
            notes.append(f"the old map had the shape {old.map.shape}, and the new one has (B, N, M)")
        notes += notes_of(foreign, to_canonical(new), dropped_map=pair and not keep)
        report = ConvertedLayer(
            self.names,
            type(self.layer).__name__,
            dialect.name,
            foreign.config.to_dict(),
            theirs,
            ours,
            (*failures, *([failure] if failure else [])),
            returns_map=isinstance(new, SelfAttention2DWithMap),
            assumptions=foreign.assumptions,
            notes=(*foreign.notes, *places, *notes, *([training] if training else [])),
        )
        return new, report

    def _made(self, probed: Foreign, asked: Question, *, pair: bool) -> SelfAttention2D:
        """Our layer with the parameters of the question."""
        return make(_kind(pair), probed.config, asked.params, block_size=self.options.block_size)

    def _ask(self, foreign: Foreign, asked: Question) -> Answers:
        """The answers of a copy of the probe, because a call may move its state."""
        old = copied(self.probe)
        paths = {name: self._path(foreign, name) for name in parameter_table(foreign.config)}
        shape = asked.x.shape
        try:
            answers = answered(old, asked, {name: path for name, path in paths.items() if path})
        except PortError as error:
            raise PortError(f"{self.where}: {error}") from error
        except Exception as error:
            raise self._does_not_run(shape, f"{type(error).__name__}: {error}") from error
        return answers

    def _in_training(self, foreign: Foreign, asked: Question, rested: Answers) -> tuple[str, str]:
        """A failure and a note from comparing both layers in training mode. At least one of them is "".

        Args:
            foreign: the layer.
            asked: the question.
            rested: the answers of the old layer in evaluation mode.
        """
        pair = rested.map is not None
        try:
            result = trained(copied(self.probe), asked)
        except Exception as error:
            return "", (
                f"it does not run in training mode ({type(error).__name__}: {error}), but the new one does; they were compared only in "
                "evaluation mode"
            )
        y = result[0] if pair and isinstance(result, tuple | list) and len(result) == 2 else result
        if not isinstance(y, jax.Array) or y.shape != rested.y.shape or pair is (y is result):
            return (
                f"in training mode it returns {shown(result)}, and in evaluation mode "
                f"{shown((rested.y, rested.map) if pair else rested.y)}"
            ), ""
        ours = trained(self._made(foreign, asked, pair=False), asked)
        return self._differs_in_training(foreign, asked, read(y), read(ours))

    def _told(self, answers: Answers, foreign: Foreign, asked: Question) -> dict[str, Array]:
        """The answers of the old layer in the shapes of the definition."""
        found = {"y": read(answers.y), "x": read(answers.dx)}
        if answers.map is not None:
            if not isinstance(answers.map, jax.Array | np.ndarray):
                raise PortError(
                    f"{self.where}: returned y and {shown(answers.map)}; expected y, or y and its map."
                )
            found["map"] = self._map(read(answers.map), foreign, asked)
        for name, gradient in answers.gradients.items():
            array = read(gradient)
            matrix = to_matrix(array, foreign.axes[name]) if name in foreign.axes else array
            found[name] = matrix.reshape(foreign.params[name].shape)
        return found

    def _dressed(
        self, foreign: Foreign, old: Answers, size: tuple[int, ...], *, pair: bool
    ) -> tuple[SelfAttention2D, list[str]]:
        """Our layer with everything from the old one, and the notes about it."""
        dtype, precision = self._computation(foreign)
        kind = _kind(pair)
        made = {"block_size": self.options.block_size, "precision": precision}
        new = make(kind, foreign.config, foreign.params, dtype=dtype, **made)
        self._dress(new, foreign)
        notes = []
        if dtype is not None and not self._returns_alike(new, size):
            plain = make(kind, foreign.config, foreign.params, dtype=None, **made)
            self._dress(plain, foreign)
            if self._returns_alike(plain, size):
                new = plain
                notes.append(
                    f"the old layer computes in {jnp.dtype(dtype)} and returns another dtype; the new one computes in the dtype that "
                    "its input and parameters promote to, and returns the same dtype as the old one"
                )
        if not self._returns_alike(new, size):
            notes.append("the new layer returns another dtype than the old one for some inputs")
        if old.sown:
            notes.append(
                f"the old layer sows {', '.join(old.sown)}; the new one sows attention_weights, and only if it is called with "
                "sow_weights=True"
            )
        if foreign.config.spectral_norm:
            modes = modes_of(self.layer)
            if not modes:
                notes.append(
                    "the old layer has no mode that train() and eval() set; the new one is in training mode"
                )
            for _, module in nnx.iter_graph(new):
                if isinstance(module, NNXSpectralConv):
                    module.use_running_average = modes == {True}
            steps = {
                node.n_steps for _, node in nnx.iter_graph(self.layer) if isinstance(node, nnx.SpectralNorm)
            }
            if steps - {1}:
                notes.append(
                    f"the old layer makes {' or '.join(map(str, sorted(steps)))} power iterations in each call, and the new one makes 1"
                )
        if old.moved:
            notes.append(
                f"the old layer moves its {listed(old.moved, 3)} in evaluation too; the new one changes nothing in evaluation"
            )
        return new, [*notes, *self._arguments()]

    def _arguments(self) -> list[str]:
        """The notes about arguments of the old layer's call."""
        known = inspect.signature(SelfAttention2D.__call__).parameters
        given = list(inspect.signature(type(self.layer).__call__).parameters.values())[2:]
        others = [one.name for one in given if one.name not in known]
        return (
            [f"the new layer takes no argument {', '.join(others)}; change the code that passes it"]
            if others
            else []
        )

    def _dress(self, new: SelfAttention2D, foreign: Foreign) -> None:
        """Give each of our variables the type, metadata, dtype and device of the variable that it comes from."""
        sources = [self._leaf(key) for origin in foreign.origins.values() for key in origin.sources]
        for name, origin in foreign.origins.items():
            path = _own_path(name)
            owner = at_path(new, path[:-1])
            value = getattr(owner, path[-1])[...]
            there = [self._leaf(key) for key in origin.sources]
            like = next((leaf for leaf in there if isinstance(leaf, nnx.Param)), (*there, *sources)[0])
            array = like.get_raw_value() if isinstance(like, nnx.Variable) else like
            value = value.astype(array.dtype)
            if isinstance(array, jax.Array) and array.committed:
                value = jax.device_put(value, array.sharding)
            else:
                value = jnp.asarray(np.asarray(value))
            if path[-1] in ("u", "v"):
                variable = nnx.BatchStat(value)
            elif there and isinstance(like, nnx.Variable):
                kept = {
                    key: each for key, each in like.get_metadata().items() if key not in _OF_EVERY_VARIABLE
                }
                variable = type(like)(value, **kept)
            else:
                variable = nnx.Variable(value)
            setattr(owner, path[-1], variable)

    def _computation(self, foreign: Foreign) -> tuple[DTypeLike | None, Any]:
        """The dtype and the precision that the projections compute with."""
        nodes = dict(nnx.iter_graph(self.layer))
        owners = []
        for name, origin in foreign.origins.items():
            if name.endswith("kernel"):
                path, _ = self.leaves[self._key(origin.sources[0])]
                owners.append(nodes[path[:-1]])
        dtypes = {getattr(owner, "dtype", None) for owner in owners}
        found = {None if dtype is None else jnp.dtype(dtype) for dtype in dtypes}
        precisions = [getattr(owner, "precision", None) for owner in owners]
        if len(found) > 1 or any(one != precisions[0] for one in precisions):
            shown = ", ".join(sorted(str(one) for one in found))
            raise PortError(
                f"{self.where}: its projections compute in different ways (dtypes {shown}; precisions "
                f"{', '.join(str(one) for one in precisions)}), but those of the new layer compute in one way; make them equal first"
            )
        return found.pop(), precisions[0]

    def _returns_alike(self, new: SelfAttention2D, size: tuple[int, ...]) -> bool:
        """Whether y has the same dtype as the old layer's for inputs of the usual dtypes."""
        shape = (1, *size, new.config.channels)
        dtypes = ("float32", "bfloat16", "float16")
        try:
            old = [dtype_of(self.layer, shape, dtype) for dtype in dtypes]
        except Exception as error:
            raise self._does_not_run(shape, f"{type(error).__name__}: {error}") from error
        return old == [dtype_of(new, shape, dtype) for dtype in dtypes]

    def _key(self, source: str) -> str:
        """The key that `leaves_of` gives a tensor of either form."""
        return source if source in self.leaves else source.removesuffix("/value")

    def _leaf(self, source: str) -> Any:
        return self.leaves[self._key(source)][1]

    def _path(self, foreign: Foreign, name: str) -> KeyPath:
        source = foreign.source(name)
        return self.leaves[self._key(source)][0] if source else ()


def modes_of(layer: nnx.Module) -> set[bool]:
    """Whether the parts of a layer that have a mode are in evaluation mode."""
    found: dict[str, set[bool]] = {"use_running_average": set(), "deterministic": set()}
    for _, module in nnx.iter_modules(layer):
        for name, modes in found.items():
            if isinstance(mode := getattr(module, name, None), bool):
                modes.add(mode)
    return found["use_running_average"] or found["deterministic"]


def _ours(answers: Answers, foreign: Foreign) -> dict[str, Array]:
    found = {"y": read(answers.y), "x": read(answers.dx)}
    if answers.map is not None:
        found["map"] = read(answers.map)
    for name, gradient in answers.gradients.items():
        found[name] = read(gradient).reshape(foreign.params[name].shape)
    return found


def _kind(pair: bool) -> type[SelfAttention2D]:
    return SelfAttention2DWithMap if pair else SelfAttention2D


def _own_path(name: str) -> KeyPath:
    return tuple(name.split("."))
