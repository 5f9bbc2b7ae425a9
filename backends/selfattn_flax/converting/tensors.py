"""The tensors of an NNX module, by the names of its checkpoint."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from selfattn_core.arrays import Array, widen
from selfattn_core.porting.formats.tensors import Entry, TensorInfo, Tensors

__all__ = ["forms_of", "leaves_of", "read"]

KeyPath = tuple[Any, ...]


def leaves_of(module: nnx.Module) -> dict[str, tuple[KeyPath, Any]]:
    """The variables and plain arrays of a module with their paths, by key such as "query/kernel"."""
    return {"/".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(nnx.state(module))}


def forms_of(module: nnx.Module, name: str) -> list[Tensors]:
    """The tensors of a checkpoint of the module, in each of the naming schemes of checkpoints.

    Args:
        module: a whole model or a layer.
        name: name of its place.

    Returns:
        The tensors with the keys of `nnx.to_pure_dict`, and with those of Orbax, which may end with the level "value".
    """
    where = Path(f"{name or 'the model'} ({type(module).__name__})")
    entries: dict[str, Entry] = {}
    variables: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for key, (_, leaf) in leaves_of(module).items():
        value = leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf
        if isinstance(leaf, nnx.RngState | nnx.Intermediate):
            # Not used by the layer in evaluation mode.
            continue
        if not isinstance(value, jax.Array | np.ndarray):
            left_out[key] = f"{key} is a {type(leaf).__name__}"
            continue
        info = TensorInfo(tuple(value.shape), str(value.dtype))
        entries[key] = Entry(info, partial(read, value))
        variables[key] = f"{key}/value" if isinstance(leaf, nnx.Variable) else key
    deeper = {variables[key]: entry for key, entry in entries.items()}
    return [Tensors(where, "module", each, left_out=left_out) for each in (entries, deeper)]


def read(value: Any) -> Array:
    """A variable's values as a new array. 16-bit dtypes that numpy does not have are widened."""
    return np.array(widen(np.asarray(value)), order="C")
