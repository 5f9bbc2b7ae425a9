"""Conversion of canonical arrays to and from Flax trees, for NNX and Linen."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from selfattn_core import SelfAttentionConfig
from selfattn_core.arrays import Array, widen
from selfattn_core.params import check_params

__all__ = ["to_numpy", "to_tree"]


def to_numpy(parameter: jax.Array) -> Array:
    """A parameter as a new contiguous numpy array. A 1×1 kernel becomes a matrix."""
    array = np.asarray(parameter)
    if array.ndim == 4 and array.shape[:2] == (1, 1):
        array = array[0, 0]
    return np.array(widen(array), order="C")


def to_tree(
    config: SelfAttentionConfig, params: Mapping[str, Array], param_dtype: DTypeLike | None
) -> dict[str, Any]:
    """Canonical arrays as the tree of NNX. Linen has the same tree, except that it keeps the state apart.

    Args:
        config: options of the layer.
        params: arrays by canonical name.
        param_dtype: dtype of the parameters. None keeps that of the arrays.

    Returns:
        {"query": {"kernel": (1, 1, C, Dk), "bias": (Dk,)}, …, "gamma": (1,)}, with new arrays. With spectral norm, each
        kernel has "u" (Dk,) and "v" (C,) beside it.

    Raises:
        ValueError: if the arrays do not fit the config (lists every problem), or if float64 is wanted and JAX has none.
    """
    arrays = check_params(config, params)
    dtype = arrays["gamma"].dtype if param_dtype is None else jnp.dtype(param_dtype)
    if dtype == np.float64 and not jax.config.jax_enable_x64:
        raise ValueError(
            "selfattn_flax: float64 parameters are wanted, but JAX would silently make them float32: pass param_dtype, for "
            "example param_dtype=jnp.float32, or enable float64 first (JAX_ENABLE_X64=1 in the environment)."
        )
    flat = {}
    for name, array in arrays.items():
        shaped = array[None, None] if name.endswith("kernel") else array
        flat[name] = jnp.array(shaped.astype(dtype))
    return traverse_util.unflatten_dict(flat, sep=".")
