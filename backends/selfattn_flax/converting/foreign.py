"""A foreign attention layer of an NNX model: its tensors, its answers, and the layer of ours that takes its place."""

import inspect
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from numpy.typing import NDArray

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
from selfattn_flax.converting.graph import copied
from selfattn_flax.converting.tensors import forms_of, leaves_of, read
from selfattn_flax.nnx import SelfAttention2D
from selfattn_flax.spectral_norm import NNXSpectralConv
from selfattn_flax.weights import make, to_canonical
from selfattn_flax.with_map import SelfAttention2DWithMap

__all__ = ["ForeignLayer", "modes_of"]

Array = NDArray[Any]
KeyPath = tuple[Any, ...]
# What `nnx.Variable` sets itself.
_OF_EVERY_VARIABLE = ("hijax", "ref", "eager_sharding")


@dataclass
class _Answers:
    """What a layer says.

    Args:
        y: (B, H, W, C).
        dx: the gradient of x.
        map: what it returns beside y; None if it returns y alone.
        gradients: by canonical name, in the layer's own form.
        sown: names of what it sowed.
        moved: keys of what it changed in itself.
    """

    y: Any
    dx: Any
    map: Any
    gradients: Mapping[str, Any]
    sown: list[str]
    moved: list[str]


class ForeignLayer(ForeignLayerBase[SelfAttention2D]):
    """One module that is to be replaced.

    Args:
        layer: the module.
        names: of every place where it stands.
        options: of the conversion.
    """

    def __init__(self, layer: nnx.Module, names: tuple[str, ...], options: Options) -> None:
        super().__init__(layer, names, options)
        self.leaves = leaves_of(layer)
        self.tensors = forms_of(layer, names[0])[0]
        self.probe = _probe(layer)

    def _form(self, layer: nnx.Module, dialect: Dialect) -> Tensors:
        """The layer's tensors, in the form that has the keys of the dialect."""
        forms = forms_of(layer, self.names[0])
        return next((form for form in forms if "" in prefixes(dialect, index_of(form))), forms[0])

    def _twin(self, dialect: Dialect) -> tuple[SelfAttention2D, ConvertedLayer]:
        foreign, probed = (
            self._read(self._form(each, dialect), dialect) for each in (self.layer, self.probe)
        )
        every: list[tuple[Question, _Answers]] = []

        def answers(asked: Question) -> tuple[dict[str, Array], dict[str, Array]]:
            with _arithmetic(asked.x.dtype):
                old = self._ask(probed, asked)
                told = self._told(old, probed, asked)
                every.append((asked, old))
                twin = self._made(probed, asked, pair=old.map is not None)
                paths = {name: _own_path(name) for name in parameter_table(probed.config)}
                return told, _ours(_answered(twin, asked, paths), probed)

        theirs, ours, failures, places = self._compared(probed, answers)
        asked, old = every[0]
        pair = old.map is not None
        if len({each.map is None for _, each in every}) > 1:
            failures = (*failures, "it returns (y, A) at some sizes of its input only")
        keep = pair and self.options.returns == "same"
        with _arithmetic(asked.x.dtype):
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

    def _ask(self, foreign: Foreign, asked: Question) -> _Answers:
        """The answers of the probe, of which a copy is asked, since a question may move its state."""
        old = copied(self.probe)
        paths = {name: self._path(foreign, name) for name in parameter_table(foreign.config)}
        shape = asked.x.shape
        try:
            answers = _answered(old, asked, {name: path for name, path in paths.items() if path})
        except PortError as error:
            raise PortError(f"{self.where}: {error}") from error
        except Exception as error:
            raise self._does_not_run(shape, f"{type(error).__name__}: {error}") from error
        return answers

    def _in_training(self, foreign: Foreign, asked: Question, rested: _Answers) -> tuple[str, str]:
        """What to say of both layers in training mode: a failure and a note, one of them or both "".

        Args:
            foreign: the layer.
            asked: the question.
            rested: the answers of the old layer in evaluation mode.
        """
        pair = rested.map is not None
        try:
            result = _trained(copied(self.probe), asked)
        except Exception as error:
            return "", (
                f"it does not run in training mode ({type(error).__name__}: {error}), where the new one does; it was compared in "
                "evaluation mode"
            )
        y = result[0] if pair and isinstance(result, tuple | list) and len(result) == 2 else result
        if not isinstance(y, jax.Array) or y.shape != rested.y.shape or pair is (y is result):
            return (
                f"in training mode it returns {_shown(result)}, and in evaluation mode "
                f"{_shown((rested.y, rested.map) if pair else rested.y)}"
            ), ""
        ours = _trained(self._made(foreign, asked, pair=False), asked)
        return self._differs_in_training(foreign, asked, read(y), read(ours))

    def _told(self, answers: _Answers, foreign: Foreign, asked: Question) -> dict[str, Array]:
        """The answers of the old layer in the shapes of the definition."""
        found = {"y": read(answers.y), "x": read(answers.dx)}
        if answers.map is not None:
            if not isinstance(answers.map, jax.Array | np.ndarray):
                raise PortError(
                    f"{self.where}: returned y and {_shown(answers.map)}; expected y, or y and its map."
                )
            found["map"] = self._map(read(answers.map), foreign, asked)
        for name, gradient in answers.gradients.items():
            array = read(gradient)
            matrix = to_matrix(array, foreign.axes[name]) if name in foreign.axes else array
            found[name] = matrix.reshape(foreign.params[name].shape)
        return found

    def _dressed(
        self, foreign: Foreign, old: _Answers, size: tuple[int, ...], *, pair: bool
    ) -> tuple[SelfAttention2D, list[str]]:
        """Our layer with everything of the old one, and what is to say of it."""
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
                    f"the old layer computes in {jnp.dtype(dtype)} and returns another dtype; the new one computes in that which "
                    "its input and its parameters promote to, and returns what the old one does"
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
                f"the old layer moves its {listed(old.moved, 3)} in evaluation too; the new one moves nothing there"
            )
        return new, [*notes, *self._arguments()]

    def _arguments(self) -> list[str]:
        """What is to say of what the old layer may be called with."""
        known = inspect.signature(SelfAttention2D.__call__).parameters
        given = list(inspect.signature(type(self.layer).__call__).parameters.values())[2:]
        others = [one.name for one in given if one.name not in known]
        return (
            [f"the new layer takes no argument {', '.join(others)}; change what passes it"] if others else []
        )

    def _dress(self, new: SelfAttention2D, foreign: Foreign) -> None:
        """Give each variable of ours the type, the metadata, the dtype and the device of what it comes from."""
        sources = [self._leaf(key) for origin in foreign.origins.values() for key in origin.sources]
        for name, origin in foreign.origins.items():
            path = _own_path(name)
            owner = _at(new, path[:-1])
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
                f"{', '.join(str(one) for one in precisions)}), and those of the new layer all in one; make them alike first"
            )
        return found.pop(), precisions[0]

    def _returns_alike(self, new: SelfAttention2D, size: tuple[int, ...]) -> bool:
        """Whether the dtype of y is the old layer's for inputs of the usual dtypes."""
        shape = (1, *size, new.config.channels)
        dtypes = ("float32", "bfloat16", "float16")
        try:
            old = [_dtype_of(self.layer, shape, dtype) for dtype in dtypes]
        except Exception as error:
            raise self._does_not_run(shape, f"{type(error).__name__}: {error}") from error
        return old == [_dtype_of(new, shape, dtype) for dtype in dtypes]

    def _key(self, source: str) -> str:
        """What `leaves_of` calls a tensor of either form."""
        return source if source in self.leaves else source.removesuffix("/value")

    def _leaf(self, source: str) -> Any:
        return self.leaves[self._key(source)][1]

    def _path(self, foreign: Foreign, name: str) -> KeyPath:
        source = foreign.source(name)
        return self.leaves[self._key(source)][0] if source else ()


def modes_of(layer: nnx.Module) -> set[bool]:
    """Whether the parts of a layer that have a mode are in that of evaluation."""
    found: dict[str, set[bool]] = {"use_running_average": set(), "deterministic": set()}
    for _, module in nnx.iter_modules(layer):
        for name, modes in found.items():
            if isinstance(mode := getattr(module, name, None), bool):
                modes.add(mode)
    return found["use_running_average"] or found["deterministic"]


def _answered(layer: nnx.Module, asked: Question, paths: Mapping[str, KeyPath]) -> _Answers:
    """What a layer says in evaluation mode, on the CPU and in the dtype of the question.

    Args:
        layer: a copy, which is changed.
        asked: the question.
        paths: of its parameters whose gradients are wanted, by canonical name.

    Raises:
        PortError: if it does not return what a layer returns. Errors of its own pass through.
    """
    dtype = asked.x.dtype
    _at_rest(layer, dtype)
    graph, state = nnx.split(layer)
    before = _values(layer)
    start = {name: _array_at(nnx.merge(graph, state, copy=True), path) for name, path in paths.items()}
    sown: list[str] = []

    def call(values: Mapping[str, Any], x: jax.Array) -> tuple[Any, Any]:
        module = nnx.merge(graph, state, copy=True)
        for name, value in values.items():
            _set(module, paths[name], value)
        known = _sown(module)
        result = module(x)
        sown.extend(name for name in _sown(module) if name not in known)
        pair = isinstance(result, tuple | list) and len(result) == 2
        y = result[0] if pair else result
        if not isinstance(y, jax.Array) or y.shape != x.shape:
            raise PortError(
                f"returned {_shown(result)} for an input {x.shape}; expected y of the same shape, or (y, A)."
            )
        return y.astype(dtype), (result[1] if pair else None, _values(module))

    with warnings.catch_warnings():
        # Of `sow`, outside of `nnx.capture`.
        warnings.simplefilter("ignore", DeprecationWarning)
        x = jax.device_put(asked.x, _cpu())
        y, back, (beside, after) = jax.vjp(call, start, x, has_aux=True)
    gradients, dx = back(jax.device_put(asked.dy, _cpu()))
    moved = [key for key, value in before.items() if not np.array_equal(after[key], value)]
    return _Answers(y, dx, beside, gradients, sown, moved)


def _trained(layer: nnx.Module, asked: Question) -> Any:
    """What a layer returns in training mode, on the CPU and in the dtype of the question.

    Args:
        layer: a copy, which is changed.
        asked: the question.
    """
    _at_rest(layer, asked.x.dtype)
    layer.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return layer(jax.device_put(asked.x, _cpu()))


def _probe(layer: nnx.Module) -> nnx.Module:
    """A copy to ask, on the CPU, in at least float32, in which no parameter is zero.

    A gamma of 0, or a last kernel or a batch norm that begins with zeros, hides whatever else the layer computes.
    """
    probe = copied(layer)
    double = any(value.dtype == np.float64 for value in _values(layer).values())
    dtype = np.dtype(np.float64 if double else np.float32)
    generator = np.random.default_rng(0)
    with _arithmetic(dtype):
        _at_rest(probe, dtype)
        for path, leaf in leaves_of(probe).values():
            value = leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf
            if _is_floating(value) and not isinstance(leaf, nnx.BatchStat) and not np.any(value):
                numbers = 0.7 + 0.3 * generator.standard_normal(value.shape)
                _set(probe, path, jnp.asarray(numbers, dtype))
    return probe


def _at_rest(layer: nnx.Module, dtype: DTypeLike) -> None:
    """Set a copy to evaluation, to the CPU and to a dtype."""
    layer.eval()
    for _, module in nnx.iter_modules(layer):
        computes = vars(module).get("dtype")
        if computes is not None and jnp.issubdtype(computes, jnp.floating):
            module.dtype = dtype
    nnx.update(layer, jax.tree.map(lambda leaf: _moved(leaf, dtype), nnx.state(layer)))


def _values(module: nnx.Module) -> dict[str, Any]:
    """The floating-point arrays of a module by key."""
    found = {}
    for key, (_, leaf) in leaves_of(module).items():
        value = leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf
        if _is_floating(value) and not isinstance(leaf, nnx.Intermediate):
            found[key] = value
    return found


def _ours(answers: _Answers, foreign: Foreign) -> dict[str, Array]:
    found = {"y": read(answers.y), "x": read(answers.dx)}
    if answers.map is not None:
        found["map"] = read(answers.map)
    for name, gradient in answers.gradients.items():
        found[name] = read(gradient).reshape(foreign.params[name].shape)
    return found


def _kind(pair: bool) -> type[SelfAttention2D]:
    return SelfAttention2DWithMap if pair else SelfAttention2D


def _arithmetic(dtype: DTypeLike) -> AbstractContextManager[Any]:
    """In which a question of this dtype is answered as it is asked, whatever the process is set to."""
    stack = ExitStack()
    stack.enter_context(jax.default_device(_cpu()))
    stack.enter_context(jax.default_matmul_precision("highest"))
    if dtype == np.float64:
        stack.enter_context(jax.enable_x64(True))
    return stack


def _cpu() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise PortError(
            "convert asks layers on the CPU, which JAX has been told to leave out; add cpu to JAX_PLATFORMS, as in "
            "JAX_PLATFORMS=cuda,cpu"
        ) from error


def _moved(leaf: Any, dtype: DTypeLike) -> Any:
    if not isinstance(leaf, jax.Array | np.ndarray):
        return leaf
    if _is_floating(leaf):
        leaf = leaf.astype(dtype)
    return jax.device_put(leaf, _cpu())


def _is_floating(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray) and jnp.issubdtype(value.dtype, jnp.floating)


def _dtype_of(layer: nnx.Module, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    graph, state = nnx.split(layer)

    def call(state: Any, x: jax.Array) -> Any:
        module = nnx.merge(graph, state, copy=True)
        module.eval()
        result = module(x)
        return result[0] if isinstance(result, tuple | list) else result

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return jax.eval_shape(call, state, jax.ShapeDtypeStruct(shape, dtype)).dtype


def _sown(module: nnx.Module) -> list[str]:
    return [
        ".".join(map(str, path))
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Intermediate)
    ]


def _own_path(name: str) -> KeyPath:
    return tuple(name.split("."))


def _at(module: nnx.Module, path: KeyPath) -> Any:
    return next(node for place, node in nnx.iter_graph(module) if place == path)


def _array_at(module: nnx.Module, path: KeyPath) -> Any:
    leaf = _at(module, path)
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _set(module: nnx.Module, path: KeyPath, value: Any) -> None:
    leaf = _at(module, path)
    if isinstance(leaf, nnx.Variable):
        leaf.set_value(value)
    else:
        setattr(_at(module, path[:-1]), path[-1], value)


def _shown(value: Any) -> str:
    if isinstance(value, jax.Array | np.ndarray):
        return f"an array {value.shape}"
    if isinstance(value, tuple | list):
        return f"({', '.join(_shown(each) for each in value)})"
    return f"a {type(value).__name__}"
