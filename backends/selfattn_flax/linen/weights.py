"""Conversion of the Linen layer's weights to and from canonical arrays and files."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.typing import DTypeLike

import selfattn_core
from selfattn_core import SelfAttentionConfig
from selfattn_core.arrays import Array
from selfattn_core.params import check_params, state_table
from selfattn_core.porting.load import load_any
from selfattn_core.weights import PathLike
from selfattn_flax.linen.layer import SelfAttention2D, config_of
from selfattn_flax.spectral_norm import converged_state
from selfattn_flax.trees import to_numpy, to_tree


def to_canonical(module: SelfAttention2D, variables: Mapping[str, Any]) -> dict[str, Array]:
    """The layer's weights and its spectral norm state, if any, as new contiguous numpy arrays by canonical name.

    Args:
        module: the layer, bound or not.
        variables: its variables, {"params": {"query": …, …}} and with spectral norm {"batch_stats": …}, with or
            without partitioning metadata. bfloat16 is widened to float32, which is exact.

    Returns:
        Kernels (C_in, C_out), biases (C_out,) and gamma (1,). With spectral norm the kernels are the raw ones.

    Raises:
        ValueError: if the variables do not belong to this module. It lists every problem.

    Example:
        >>> module = SelfAttention2D()
        >>> variables = module.init(jax.random.key(0), jnp.zeros((1, 1, 16)))
        >>> to_canonical(module, variables)["query.kernel"].shape
        (16, 2)
    """
    return _weights(module, variables)[1]


def from_canonical(
    config: SelfAttentionConfig,
    params: Mapping[str, Array],
    *,
    block_size: int | None = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    name: str | None = None,
) -> tuple[SelfAttention2D, dict[str, Any]]:
    """A module and variables with these weights.

    Args:
        config: options of the layer.
        params: arrays by canonical name.
        block_size: see `SelfAttention2D`.
        dtype: dtype of the computation, see `SelfAttention2D`.
        param_dtype: dtype of the parameters; by default that of the arrays.
        precision: see `SelfAttention2D`.
        name: name of the module.

    Raises:
        ValueError: if the arrays do not fit the config (lists every problem), or if they are float64 while JAX has no
            float64.

    Example:
        >>> module = SelfAttention2D()
        >>> variables = module.init(jax.random.key(0), jnp.zeros((1, 1, 16)))
        >>> config = module.bind(variables).config
        >>> twin, copied = from_canonical(config, to_canonical(module, variables))
        >>> bool((copied["params"]["key"]["kernel"] == variables["params"]["key"]["kernel"]).all())
        True
    """
    tree = to_tree(config, params, param_dtype)
    module = SelfAttention2D.from_config(
        config,
        block_size=block_size,
        dtype=dtype,
        param_dtype=tree["gamma"].dtype,
        precision=precision,
        name=name,
    )
    flat = traverse_util.flatten_dict(tree, sep=".")
    state = {name: flat.pop(name) for name in state_table(config)}
    variables = {"params": flat, "batch_stats": state} if state else {"params": flat}
    return module, {
        collection: traverse_util.unflatten_dict(arrays, sep=".") for collection, arrays in variables.items()
    }


def refresh_spectral_norm(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The same variables, with the state of every spectral norm recomputed for its current kernel.

    Call it after you set kernels outside training: reinitialised, averaged, or restored without their "batch_stats". The
    old state belongs to other kernels, and the first outputs in evaluation could be wrong by any factor.

    Args:
        variables: {"params": …, "batch_stats": …} of a layer or of a whole model, outside jitted functions. The
            "batch_stats" may come from `init`. The state of other modules does not change.

    Returns:
        A new dict, which shares all unchanged arrays.

    Example:
        >>> module = SelfAttention2D(spectral_norm=True, use_running_average=True)
        >>> x = jnp.zeros((1, 2, 3, 16))
        >>> state = module.init(jax.random.key(0), x)["batch_stats"]
        >>> variables = {"params": module.init(jax.random.key(1), x)["params"], "batch_stats": state}
        >>> fresh = refresh_spectral_norm(variables)
        >>> value = to_canonical(module, fresh)
        >>> bool(value["value.v"] @ value["value.kernel"] @ value["value.u"] > 0.99 * jnp.linalg.norm(value["value.kernel"], 2))
        True
    """
    state = traverse_util.flatten_dict(variables.get("batch_stats", {}))
    kernels = traverse_util.flatten_dict(nn.meta.unbox(variables.get("params", {})))
    for path in [path for path in state if path[-1] == "u"]:
        child = path[:-1]
        kernel, v = kernels.get((*child, "kernel")), state.get((*child, "v"))
        if kernel is not None and v is not None and jnp.shape(kernel) == (1, 1, *v.shape, *state[path].shape):
            state[path], state[(*child, "v")] = converged_state(kernel)
    return {**variables, "batch_stats": traverse_util.unflatten_dict(state)}


def load(
    path: PathLike,
    *,
    block: str | None = None,
    dialect: str | None = None,
    prefix: str | None = None,
    settings: Mapping[str, str | bool | float] | None = None,
    strict: bool = True,
    block_size: int | None = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    name: str | None = None,
) -> tuple[SelfAttention2D, dict[str, Any]]:
    """Load a module and variables from a canonical file, whichever framework wrote it, or from anybody's checkpoint.

    Args:
        path: a canonical `.safetensors` file. With `dialect`, a checkpoint in any format that `selfattn inspect` reads.
        block: name of the block, if a canonical file holds several.
        dialect: dialect of a checkpoint: a name that `selfattn dialects` lists, or your own `.toml` file.
        prefix: prefix of the block, if a checkpoint holds several.
        settings: facts that a checkpoint does not contain, for example {"use_scale": False}.
        strict: whether unused tensors under the prefix are an error.
        block_size: see `SelfAttention2D`.
        dtype: dtype of the computation, see `SelfAttention2D`.
        param_dtype: dtype of the parameters; by default that of the file.
        precision: see `SelfAttention2D`.
        name: name of the module.

    Warns:
        UserWarning: if stored vectors u and v of spectral norm do not have length 1, for example because they are
            averages. Also if neither `settings` nor a native file of this library contains `kv_pool`.

    Raises:
        FileNotFoundError: if the canonical file does not exist.
        ValueError: if the file is incomplete or does not fit (lists every problem), or if it holds float64 while JAX
            has no float64.
    """
    config, params = load_any(
        path, block=block, dialect=dialect, prefix=prefix, settings=settings, strict=strict
    )
    return from_canonical(
        config,
        params,
        block_size=block_size,
        dtype=dtype,
        param_dtype=param_dtype,
        precision=precision,
        name=name,
    )


def save(
    module: SelfAttention2D,
    variables: Mapping[str, Any],
    path: PathLike,
    *,
    overwrite: bool = False,
    source: str = "",
) -> None:
    """Write the layer's weights to a canonical file.

    Args:
        module: the layer.
        variables: variables of the layer.
        path: the `.safetensors` file; its folder must exist.
        overwrite: whether an existing file may be replaced.
        source: note on the origin of the weights, stored in the file.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
        OSError: if the file cannot be written. An existing file then stays unchanged.
        ValueError: if the variables do not belong to this module, or a weight is not finite.

    Example:
        >>> import tempfile
        >>> module = SelfAttention2D()
        >>> variables = module.init(jax.random.key(0), jnp.zeros((1, 1, 16)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(module, variables, f"{folder}/layer.safetensors")
        ...     load(f"{folder}/layer.safetensors")[0].qk_channels
        2
    """
    selfattn_core.save(path, *_weights(module, variables), overwrite=overwrite, source=source)


def _weights(
    module: SelfAttention2D, variables: Mapping[str, Any]
) -> tuple[SelfAttentionConfig, dict[str, Array]]:
    unboxed = nn.meta.unbox(variables)
    flat = traverse_util.flatten_dict(unboxed.get("params", {}), sep=".")
    if module.spectral_norm:
        flat |= traverse_util.flatten_dict(unboxed.get("batch_stats", {}), sep=".")
    arrays = {name: to_numpy(array) for name, array in flat.items()}
    if "query.kernel" not in arrays or arrays["query.kernel"].ndim != 2:
        raise ValueError(
            f"SelfAttention2D: got variables {', '.join(variables)} with the parameters {', '.join(flat) or 'none'}; "
            "expected {'params': {'query': {'kernel': (1, 1, C, Dk)}, …}}: pass the part of the tree that is this layer's."
        )
    config = config_of(module, arrays["query.kernel"].shape[0])
    return config, check_params(config, arrays, finite=False)
