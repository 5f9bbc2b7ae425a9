"""The outputs and gradients of an NNX layer, computed on a copy with other values in its variables."""

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

from selfattn_core.porting.errors import PortError
from selfattn_core.porting.networks.conversion import Question
from selfattn_flax.converting.places import copied
from selfattn_flax.converting.tensors import leaves_of

__all__ = ["Answers", "answered", "arithmetic", "at_path", "dtype_of", "probe_of", "shown", "trained"]

KeyPath = tuple[Any, ...]


@dataclass
class Answers:
    """The outputs and gradients of one call of a layer.

    Args:
        y: the output (B, H, W, C).
        dx: the gradient of x.
        map: the second value that the layer returns, or None if it returns y alone.
        gradients: gradients by canonical name, in the layer's own form.
        sown: names of the values that the layer sowed.
        moved: keys of the layer's arrays that the call changed.
    """

    y: Any
    dx: Any
    map: Any
    gradients: Mapping[str, Any]
    sown: list[str]
    moved: list[str]


def answered(layer: nnx.Module, asked: Question, paths: Mapping[str, KeyPath]) -> Answers:
    """The answers of a layer in evaluation mode, on the CPU and in the dtype of the question.

    Args:
        layer: a copy of the layer, which this function changes.
        asked: the question.
        paths: paths of the parameters to differentiate by, by canonical name.

    Raises:
        PortError: if the layer does not return y or (y, A). Errors of the layer itself pass through.
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
                f"returned {shown(result)} for an input {x.shape}; expected y of the same shape, or (y, A)."
            )
        return y.astype(dtype), (result[1] if pair else None, _values(module))

    with warnings.catch_warnings():
        # `sow` outside `nnx.capture` leaves these.
        warnings.simplefilter("ignore", DeprecationWarning)
        x = jax.device_put(asked.x, _cpu())
        y, back, (beside, after) = jax.vjp(call, start, x, has_aux=True)
    gradients, dx = back(jax.device_put(asked.dy, _cpu()))
    moved = [key for key, value in before.items() if not np.array_equal(after[key], value)]
    return Answers(y, dx, beside, gradients, sown, moved)


def trained(layer: nnx.Module, asked: Question) -> Any:
    """The result of a layer in training mode, on the CPU and in the dtype of the question.

    Args:
        layer: a copy of the layer, which this function changes.
        asked: the question.
    """
    _at_rest(layer, asked.x.dtype)
    layer.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return layer(jax.device_put(asked.x, _cpu()))


def probe_of(layer: nnx.Module) -> nnx.Module:
    """A copy for the comparison, on the CPU, in at least float32, without parameters that are zero.

    A gamma of 0, or a last kernel or batch norm that starts at zero, would hide everything else that the layer computes.
    """
    probe = copied(layer)
    double = any(value.dtype == np.float64 for value in _values(layer).values())
    dtype = np.dtype(np.float64 if double else np.float32)
    generator = np.random.default_rng(0)
    with arithmetic(dtype):
        _at_rest(probe, dtype)
        for path, leaf in leaves_of(probe).values():
            value = leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf
            if _is_floating(value) and not isinstance(leaf, nnx.BatchStat) and not np.any(value):
                numbers = 0.7 + 0.3 * generator.standard_normal(value.shape)
                _set(probe, path, jnp.asarray(numbers, dtype))
    return probe


def dtype_of(layer: nnx.Module, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """The dtype of a layer's output for an input of this shape and dtype."""
    graph, state = nnx.split(layer)

    def call(state: Any, x: jax.Array) -> Any:
        module = nnx.merge(graph, state, copy=True)
        module.eval()
        result = module(x)
        return result[0] if isinstance(result, tuple | list) else result

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return jax.eval_shape(call, state, jax.ShapeDtypeStruct(shape, dtype)).dtype


def arithmetic(dtype: DTypeLike) -> AbstractContextManager[Any]:
    """A context that computes in this dtype on the CPU, whatever the settings of the process are."""
    stack = ExitStack()
    stack.enter_context(jax.default_device(_cpu()))
    stack.enter_context(jax.default_matmul_precision("highest"))
    if dtype == np.float64:
        stack.enter_context(jax.enable_x64(True))
    return stack


def _at_rest(layer: nnx.Module, dtype: DTypeLike) -> None:
    """Set a copy to evaluation mode, to the CPU and to a dtype."""
    layer.eval()
    for _, module in nnx.iter_modules(layer):
        computes = vars(module).get("dtype")
        if computes is not None and jnp.issubdtype(computes, jnp.floating):
            module.dtype = dtype
    nnx.update(layer, jax.tree.map(lambda leaf: _moved(leaf, dtype), nnx.state(layer)))


def _values(module: nnx.Module) -> dict[str, Any]:
    """The floating-point arrays of a module, by key."""
    found = {}
    for key, (_, leaf) in leaves_of(module).items():
        value = leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf
        if _is_floating(value) and not isinstance(leaf, nnx.Intermediate):
            found[key] = value
    return found


def _cpu() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise PortError(
            "convert runs layers on the CPU, but JAX_PLATFORMS excludes it; add cpu to JAX_PLATFORMS, as in "
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


def _sown(module: nnx.Module) -> list[str]:
    return [
        ".".join(map(str, path))
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Intermediate)
    ]


def at_path(module: nnx.Module, path: KeyPath) -> Any:
    """The object at a path in a module."""
    return next(node for place, node in nnx.iter_graph(module) if place == path)


def _array_at(module: nnx.Module, path: KeyPath) -> Any:
    leaf = at_path(module, path)
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _set(module: nnx.Module, path: KeyPath, value: Any) -> None:
    leaf = at_path(module, path)
    if isinstance(leaf, nnx.Variable):
        leaf.set_value(value)
    else:
        setattr(at_path(module, path[:-1]), path[-1], value)


def shown(value: Any) -> str:
    """A description of a returned value."""
    if isinstance(value, jax.Array | np.ndarray):
        return f"an array {value.shape}"
    if isinstance(value, tuple | list):
        return f"({', '.join(shown(each) for each in value)})"
    return f"a {type(value).__name__}"
