"""The places of modules in an NNX model, and the replacement of modules there."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from selfattn_core.porting.errors import PortError

__all__ = ["copied", "places", "plain_attributes", "put"]


def places(model: nnx.Pytree) -> list[tuple[str, nnx.Pytree]]:
    """Every module, with the name of each of its places, such as "blocks.0.attention". The model itself is "".

    Args:
        model: the model. As NNX allows, it may share modules, and modules may hold their parents.
    """
    found: list[tuple[str, nnx.Pytree]] = []

    def visit(node: nnx.Pytree, name: str, above: tuple[int, ...]) -> None:
        found.append((name, node))
        for key, child in _children(node):
            if id(child) not in (*above, id(node)):
                visit(child, f"{name}.{key}" if name else key, (*above, id(node)))

    visit(model, "", ())
    return found


def put(model: nnx.Pytree, new: Mapping[int, nnx.Module]) -> None:
    """Replace modules of a model, either all of them or no module at all.

    Args:
        model: the model to change.
        new: the new modules, by `id` of the modules that they replace everywhere.

    Raises:
        PortError: if a place cannot be set. The model is then unchanged.
    """
    done: list[tuple[nnx.Pytree, str, Any]] = []
    for path, node in list(nnx.iter_graph(model)):
        if not isinstance(node, nnx.Pytree):
            continue
        for name, value in _attributes(node):
            if not any(id(leaf) in new for leaf in jax.tree.leaves(value, is_leaf=_is_node)):
                continue
            try:
                setattr(
                    node, name, jax.tree.map(lambda leaf: new.get(id(leaf), leaf), value, is_leaf=_is_node)
                )
            except Exception as error:
                for owner, place, old in reversed(done):
                    setattr(owner, place, old)
                where = ".".join(map(str, (*path, name)))
                raise PortError(
                    f"nothing was replaced, and the model is unchanged, because {where} of a {type(node).__name__} cannot be set "
                    f"({type(error).__name__}: {error}); replace the layer in the code that creates it"
                ) from error
            done.append((node, name, value))


def copied(model: nnx.Module) -> nnx.Module:
    """A copy that shares no array with the model, so that you can donate either to a jitted function."""
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(_own, state))


def plain_attributes(node: nnx.Pytree) -> Iterator[tuple[str, Any]]:
    """The names and values of attributes that are not modules, variables or arrays."""
    for name, value in _attributes(node):
        for leaf in jax.tree.leaves(value, is_leaf=_is_node):
            if not _is_node(leaf) and not isinstance(leaf, jax.Array):
                yield name, leaf


def _own(leaf: Any) -> Any:
    return jnp.copy(leaf) if isinstance(leaf, jax.Array) else copy.deepcopy(leaf)


def _attributes(node: nnx.Pytree) -> Iterator[tuple[str, Any]]:
    for name, value in list(vars(node).items()):
        if not name.startswith("_pytree__"):
            yield name, value


def _children(node: nnx.Pytree) -> Iterator[tuple[str, nnx.Pytree]]:
    for name, value in _attributes(node):
        for path, leaf in jax.tree_util.tree_leaves_with_path(value, is_leaf=_is_node):
            if isinstance(leaf, nnx.Pytree):
                inner = jax.tree_util.keystr(path, simple=True, separator=".")
                yield f"{name}.{inner}" if inner else name, leaf


def _is_node(value: Any) -> bool:
    return isinstance(value, nnx.Pytree | nnx.Variable)
