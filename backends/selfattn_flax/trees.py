"""Canonical arrays to and from trees of Flax, for NNX and for Linen."""

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
    """A parameter as a new, contiguous numpy array, a 1×1 kernel as the matrix that it is."""
    array = np.asarray(parameter)
    if array.ndim == 4 and array.shape[:2] == (1, 1):
        array = array[0, 0]
    return np.array(widen(array), order="C")


def to_tree(
    config: SelfAttentionConfig, params: Mapping[str, Array], param_dtype: DTypeLike | None
) -> dict[str, Any]:
    """Canonical arrays as the tree that NNX has, and Linen too, but for the state, which it keeps apart.

    Args:
        config: which layer.
        params: arrays by canonical name.
        param_dtype: of the parameters; None keeps that of the arrays.

    Returns:
        {"query": {"kernel": (1, 1, C, Dk), "bias": (Dk,)}, …, "gamma": (1,)}, new arrays; with spectral norm, "u" (Dk,)
        and "v" (C,) stand beside each kernel.

    Raises:
        ValueError: if the arrays do not fit the config (lists every problem), or float64 is wanted and JAX has none.
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
