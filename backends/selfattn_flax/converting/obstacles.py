"""Reasons why a layer of an NNX model cannot be replaced, found before anything is changed."""

import functools
import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from selfattn_flax.converting.foreign import modes_of
from selfattn_flax.converting.places import places, plain_attributes

__all__ = ["of_layer", "of_model", "referring"]

_HOOKS = ("on_get_value", "on_set_value", "on_create_value", "on_add_axis", "on_remove_axis")


def of_model(model: nnx.Module) -> Iterator[str]:
    """Reasons why no layer of the model can be replaced.

    Args:
        model: the whole model.
    """
    for path, node in nnx.iter_graph(model):
        where = f"{_name(path)} ({type(node).__name__})"
        if isinstance(node, nnx.Optimizer):
            yield (
                f"{where} holds a state for the model's parameters, whose names will change; convert the model alone, and make a new "
                "optimiser"
            )
        value = node.get_raw_value() if isinstance(node, nnx.Variable) else node
        if isinstance(node, nnx.Variable) and node.ref:
            yield f"{where} is a reference to an array; convert a model whose variables hold arrays"
        elif isinstance(value, jax.ShapeDtypeStruct):
            yield f"{where} is abstract and has no numbers; load the weights first"
        elif isinstance(value, jax.core.Tracer):
            yield f"{where} is traced; convert outside of jax.jit, jax.grad and their like"


def of_layer(name: str, layer: nnx.Module, model: nnx.Module) -> Iterator[str]:
    """Reasons why a layer cannot be replaced by another with the same weights.

    Args:
        name: name of its place.
        layer: the layer.
        model: the whole model.
    """
    where = f"{name or 'the model'} ({type(layer).__name__})"
    if not callable(layer):
        yield f"{where} cannot be called, so it is not a layer; narrow match="
    outside = _variables_outside(model, layer)
    for path, node in nnx.iter_graph(layer):
        inner = f"{where}: {_name(path)}"
        if isinstance(node, nnx.Dropout) and node.rate > 0:
            yield f"{inner} drops out at a rate of {node.rate}, and the new layer has no dropout; set the rate to 0"
        if isinstance(node, nnx.Variable) and not isinstance(node, nnx.RngState | nnx.Intermediate):
            yield from (f"{inner} {reason}" for reason in _of_variable(node, outside))
    for inner, outer in _modules_outside(model, layer):
        yield f"{where}: its module {inner} is also {outer}, and would no longer be shared; make them two modules"
    for pair in nnx.find_duplicates(layer, only=nnx.Param):
        yield f"{where}: {' and '.join(map(_name, pair))} are one variable, and would become two; untie them"
    if len(modes_of(layer)) > 1:
        yield f"{where} is in training mode in some of its parts only; call train() or eval() on it"


def referring(model: nnx.Module, layers: Collection[nnx.Module], *, inplace: bool) -> Iterator[str]:
    """Functions and other objects outside the NNX graph that hold parts to be replaced.

    Args:
        model: the whole model.
        layers: the layers to be replaced.
        inplace: whether the model itself is changed. In a copy, such objects still hold the old model.
    """
    replaced = {id(node) for layer in layers for _, node in places(layer)}
    everything = {id(node) for _, node in places(model)}
    wanted = replaced if inplace else everything
    seen: set[int] = set()
    for name, node in places(model):
        # The contents of a replaced layer do not matter.
        if id(node) in seen | replaced:
            continue
        seen.add(id(node))
        for key, value in plain_attributes(node):
            held = {id(one) for one in _held(value, set())}
            where = f"{name}.{key}" if name else key
            if held & replaced:
                yield (
                    f"{where} ({type(value).__name__}) holds a layer to be replaced, and NNX cannot look into it; convert the model "
                    "before you make functions from its parts, with nnx.jit for example"
                )
            elif held & wanted:
                yield (
                    f"{where} ({type(value).__name__}) holds a part of the model, and a copy of the model would still call that part; "
                    "convert with inplace=True"
                )


def _of_variable(variable: Any, outside: Collection[int]) -> Iterator[str]:
    value, metadata = variable.get_raw_value(), variable.get_metadata()
    if id(variable) in outside:
        yield "is also a variable of another module, and would no longer be shared; untie them"
    if hooks := [hook for hook in _HOOKS if metadata.get(hook)]:
        yield f"has the hooks {', '.join(hooks)}, made for the old variable; remove them, and add them to the new variable"
    if metadata.get("out_sharding") is not None or (
        isinstance(value, jax.Array) and len(value.sharding.device_set) > 1
    ):
        yield (
            "is sharded, or annotated to be, and the new layer has its axes in another order; convert first, and annotate the new "
            "variables"
        )
    if isinstance(value, jax.Array | np.ndarray) and _is_quantised(value.dtype):
        yield f"is {value.dtype}: a quantised layer; convert the floating-point model"


def _is_quantised(dtype: Any) -> bool:
    floating = jnp.issubdtype(dtype, jnp.floating)
    return dtype.itemsize < 2 and (floating or jnp.issubdtype(dtype, jnp.integer))


def _variables_outside(model: nnx.Module, layer: nnx.Module) -> set[int]:
    """The variables that the model also holds outside the layer."""
    inside = {id(node) for _, node in places(layer)}
    found: set[int] = set()
    for _, node in places(model):
        if id(node) not in inside:
            leaves = jax.tree.leaves(
                [value for name, value in vars(node).items() if not name.startswith("_pytree__")],
                is_leaf=lambda one: isinstance(one, nnx.Pytree | nnx.Variable),
            )
            found |= {id(leaf) for leaf in leaves if isinstance(leaf, nnx.Variable)}
    return found


def _modules_outside(model: nnx.Module, layer: nnx.Module) -> Iterator[tuple[str, str]]:
    """Both names of each module of the layer that holds numbers and that the model also holds outside the layer."""
    names = [name for name, node in places(model) if node is layer]
    within = tuple(f"{name}." if name else "" for name in names)
    owned: dict[int, str] = {}
    for name, node in places(layer):
        if node is not layer and _has_numbers(node):
            owned.setdefault(id(node), within[0] + name)
    for name, node in places(model):
        if id(node) in owned and not name.startswith(within):
            yield owned[id(node)], name


def _has_numbers(node: nnx.Pytree) -> bool:
    leaves = jax.tree.leaves(
        [value for name, value in vars(node).items() if not name.startswith("_pytree__")],
        is_leaf=lambda one: isinstance(one, nnx.Pytree | nnx.Variable),
    )
    return any(
        isinstance(leaf, nnx.Variable | jax.Array) and not isinstance(leaf, nnx.RngState | nnx.Intermediate)
        for leaf in leaves
    )


def _held(value: Any, seen: set[int]) -> Iterator[Any]:
    """The modules that a function or a plain object holds."""
    if id(value) in seen or isinstance(value, type):
        return
    seen.add(id(value))
    if isinstance(value, nnx.Pytree):
        yield value
        return
    inner: list[Any] = []
    if isinstance(value, Mapping):
        inner += value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        inner += value
    elif isinstance(value, functools.partial):
        inner += [value.func, value.args, value.keywords]
    elif inspect.ismethod(value):
        inner += [value.__self__, value.__func__]
    elif callable(value):
        inner += [
            cell.cell_contents for cell in getattr(value, "__closure__", None) or () if _is_filled(cell)
        ]
        inner += [getattr(value, name, None) for name in ("__wrapped__", "__defaults__", "__kwdefaults__")]
    for each in inner:
        yield from _held(each, seen)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path)) or "the model"
