"""Conversion of the Keras layer's weights to and from canonical arrays and files."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

import selfattn_core
from selfattn_core import SelfAttentionConfig, parameter_table
from selfattn_core.arrays import Array, widen
from selfattn_core.params import check_params, projections, state_table
from selfattn_core.porting.load import load_any
from selfattn_core.weights import PathLike
from selfattn_keras.layer import SelfAttention2D, own_copy


def to_canonical(layer: SelfAttention2D) -> dict[str, Array]:
    """The layer's weights and its spectral norm state, if any, as new contiguous numpy arrays by canonical name.

    Args:
        layer: a built layer on any device. bfloat16 is widened to float32, which is exact.

    Returns:
        Kernels (C_in, C_out), biases (C_out,) and gamma (1,). With spectral norm the kernels are the raw ones.

    Raises:
        ValueError: if the layer is not built yet.

    Example:
        >>> to_canonical(SelfAttention2D.from_spec(SelfAttentionConfig(16)))["query.kernel"].shape
        (16, 2)
    """
    params = {}
    for row in (parameter_table(layer.config) | state_table(layer.config)).values():
        array = widen(keras.ops.convert_to_numpy(variable(layer, row.name)))
        params[row.name] = np.array(array.reshape(row.shape), order="C")
    return params


def from_canonical(
    config: SelfAttentionConfig,
    params: Mapping[str, Array],
    *,
    block_size: int | None = None,
    data_format: str | None = None,
    dtype: Any = None,
) -> SelfAttention2D:
    """A built layer with these weights.

    Args:
        config: options of the layer.
        params: arrays by canonical name.
        block_size: see `SelfAttention2D`.
        data_format: see `SelfAttention2D`.
        dtype: name of a dtype or a dtype policy, for example "mixed_bfloat16"; by default the arrays' dtype.

    Raises:
        ValueError: if the arrays do not fit the config (lists every problem), or if their dtype is float64 and JAX does
            not have it enabled.

    Example:
        >>> layer = SelfAttention2D.from_spec(SelfAttentionConfig(16))
        >>> twin = from_canonical(layer.config, to_canonical(layer))
        >>> bool((to_canonical(twin)["key.kernel"] == to_canonical(layer)["key.kernel"]).all())
        True
    """
    arrays = check_params(config, params)
    dtype = arrays["gamma"].dtype.name if dtype is None else dtype
    _check_float64(keras.dtype_policies.get(dtype).variable_dtype)
    with undrawn():
        # The values are overwritten at once, so JAX does not draw or fill them, which it would compile for each shape. The
        # initializers are then set to the usual ones, for a new layer from the same config.
        layer = SelfAttention2D.from_spec(
            config,
            block_size=block_size,
            data_format=data_format,
            kernel_initializer=_zeros,
            bias_initializer=_zeros,
            gamma_initializer=_zeros,
            dtype=dtype,
        )
        layer.kernel_initializer = keras.initializers.get("glorot_uniform")
        layer.bias_initializer = keras.initializers.get("zeros")
        layer.gamma_initializer = keras.initializers.get("zeros")
        for name in projections(config):
            child = getattr(layer, name)
            child.kernel_initializer = own_copy(layer.kernel_initializer, name)
            child.bias_initializer = own_copy(layer.bias_initializer, name)
    for name, array in arrays.items():
        target = variable(layer, name)
        # A copy, because JAX takes over the memory of the array.
        target.assign(np.array(array, order="C").reshape(target.shape))
    return layer


@contextmanager
def undrawn() -> Iterator[None]:
    """Restore Python's random state afterwards. Initializers without a seed draw one from it.

    Example:
        >>> random.seed(1)
        >>> with undrawn():
        ...     _ = keras.layers.Dropout(0.5)
        >>> drawn = random.random()
        >>> random.seed(1)
        >>> drawn == random.random()
        True
    """
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def refresh_spectral_norm(layer: SelfAttention2D) -> None:
    """Recompute the state of every spectral norm in a layer for its current kernels.

    Call it after you set kernels outside training: assigned, averaged, or loaded without u and v. The old state belongs to
    other kernels, and the first outputs in evaluation could be wrong by any factor. Loading a file that has kernels without
    u and v calls it automatically, with a warning.

    Args:
        layer: a built layer. Its values must be readable, so do not call this inside a compiled function.

    Raises:
        ValueError: if the layer is not built yet.

    Example:
        >>> layer = SelfAttention2D.from_spec(SelfAttentionConfig(16, spectral_norm=True))
        >>> _ = layer.value.kernel.assign(keras.random.normal((1, 1, 16, 16), stddev=9.0))
        >>> refresh_spectral_norm(layer)
        >>> kernel = keras.ops.convert_to_numpy(layer.value.normalised_kernel())
        >>> round(float(np.linalg.norm(kernel[0, 0], 2)), 3)
        1.0
    """
    for name in projections(layer.config) if layer.config.spectral_norm else ():
        getattr(layer, name).refresh_state()


def _zeros(shape: tuple[int, ...], dtype: str | None = None) -> Array:  # noqa: ARG001 - Keras casts what it is given
    return np.zeros(shape, np.float32)


def load(
    path: PathLike,
    *,
    block: str | None = None,
    dialect: str | None = None,
    prefix: str | None = None,
    settings: Mapping[str, str | bool | float] | None = None,
    strict: bool = True,
    block_size: int | None = None,
    data_format: str | None = None,
    dtype: Any = None,
) -> SelfAttention2D:
    """Load a built layer from a canonical file, whichever framework wrote it, or from anybody's checkpoint.

    Args:
        path: a canonical `.safetensors` file. With `dialect`, a checkpoint in any format that `selfattn inspect` reads.
        block: name of the block, if a canonical file holds several.
        dialect: dialect of a checkpoint: a name that `selfattn dialects` lists, or your own `.toml` file.
        prefix: prefix of the block, if a checkpoint holds several.
        settings: facts that a checkpoint does not contain, for example {"use_scale": False}.
        strict: whether unused tensors under the prefix are an error.
        block_size: see `SelfAttention2D`.
        data_format: see `SelfAttention2D`.
        dtype: name of a dtype or a dtype policy; by default the file's dtype.

    Warns:
        UserWarning: if stored vectors u and v of spectral norm do not have length 1, for example because they are
            averages. Also if neither `settings` nor a native file of this library contains `kv_pool`.

    Raises:
        FileNotFoundError: if the canonical file does not exist.
        ValueError: if the file is incomplete or does not fit. It lists every problem.
    """
    config, params = load_any(
        path, block=block, dialect=dialect, prefix=prefix, settings=settings, strict=strict
    )
    return from_canonical(config, params, block_size=block_size, data_format=data_format, dtype=dtype)


def save(layer: SelfAttention2D, path: PathLike, *, overwrite: bool = False, source: str = "") -> None:
    """Write the layer's weights to a canonical file.

    Args:
        layer: the built layer.
        path: the `.safetensors` file; its folder must exist.
        overwrite: whether an existing file may be replaced.
        source: note on the origin of the weights, stored in the file.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
        OSError: if the file cannot be written. An existing file then stays unchanged.
        ValueError: if the layer is not built yet, or a weight is not finite.

    Example:
        >>> import tempfile
        >>> layer = SelfAttention2D.from_spec(SelfAttentionConfig(16))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(layer, f"{folder}/layer.safetensors")
        ...     load(f"{folder}/layer.safetensors").config == layer.config
        True
    """
    selfattn_core.save(path, layer.config, to_canonical(layer), overwrite=overwrite, source=source)


def _check_float64(dtype: str) -> None:
    """Refuse float64 if it would be narrowed. JAX itself only warns."""
    held = keras.backend.standardize_dtype(keras.ops.convert_to_tensor(np.zeros((), np.float64)).dtype)
    if dtype == "float64" != held:
        raise ValueError(
            f"selfattn_keras: got weights for a layer of dtype float64, but {keras.backend.backend()} computes in {held}: "
            'pass dtype="float32", or enable 64 bits (JAX: the environment variable JAX_ENABLE_X64=1).'
        )


def variable(layer: SelfAttention2D, name: str) -> Any:
    """The Keras variable of a canonical name.

    Example:
        >>> tuple(variable(SelfAttention2D.from_spec(SelfAttentionConfig(16)), "query.kernel").shape)
        (1, 1, 16, 2)
    """
    child, _, part = name.partition(".")
    return getattr(getattr(layer, child), part) if part else layer.gamma
