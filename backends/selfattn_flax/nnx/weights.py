"""Conversion of the NNX layer's weights to and from canonical arrays and files."""

from collections.abc import Mapping
from operator import attrgetter
from typing import TypeVar

import jax
from flax import nnx
from jax.typing import DTypeLike

import selfattn_core
from selfattn_core import SelfAttentionConfig, parameter_table
from selfattn_core.arrays import Array
from selfattn_core.params import state_table
from selfattn_core.porting.load import load_any
from selfattn_core.weights import PathLike
from selfattn_flax.nnx.layer import SelfAttention2D
from selfattn_flax.trees import to_numpy, to_tree

Layer = TypeVar("Layer", bound=SelfAttention2D)


def to_canonical(layer: SelfAttention2D) -> dict[str, Array]:
    """The layer's weights and its spectral norm state, if any, as new contiguous numpy arrays by canonical name.

    Args:
        layer: a layer on any device. bfloat16 is widened to float32, which is exact.

    Returns:
        Kernels (C_in, C_out), biases (C_out,) and gamma (1,). With spectral norm the kernels are the raw ones.

    Example:
        >>> to_canonical(SelfAttention2D(16, rngs=nnx.Rngs(0)))["query.kernel"].shape
        (16, 2)
    """
    names = parameter_table(layer.config) | state_table(layer.config)
    return {name: to_numpy(attrgetter(name)(layer)[...]) for name in names}


def from_canonical(
    config: SelfAttentionConfig,
    params: Mapping[str, Array],
    *,
    block_size: int | None = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> SelfAttention2D:
    """A layer with these weights.

    Args:
        config: options of the layer.
        params: arrays by canonical name.
        block_size: see `SelfAttention2D`.
        dtype: dtype of the computation, see `SelfAttention2D`.
        param_dtype: dtype of the parameters; by default that of the arrays.
        precision: see `SelfAttention2D`.

    Raises:
        ValueError: if the arrays do not fit the config (lists every problem), or if they are float64 while JAX has no
            float64.

    Example:
        >>> layer = SelfAttention2D(16, rngs=nnx.Rngs(0))
        >>> twin = from_canonical(layer.config, to_canonical(layer))
        >>> bool((twin.key.kernel[...] == layer.key.kernel[...]).all())
        True
    """
    return make(
        SelfAttention2D,
        config,
        params,
        block_size=block_size,
        dtype=dtype,
        param_dtype=param_dtype,
        precision=precision,
    )


def make(
    kind: type[Layer],
    config: SelfAttentionConfig,
    params: Mapping[str, Array],
    *,
    block_size: int | None = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Layer:
    """`from_canonical` for a given class."""
    tree = to_tree(config, params, param_dtype)

    def abstract() -> Layer:
        return kind.from_config(
            config,
            block_size=block_size,
            dtype=dtype,
            param_dtype=tree["gamma"].dtype,
            precision=precision,
            rngs=nnx.Rngs(0),
        )

    layer: Layer = nnx.eval_shape(abstract)
    nnx.update(layer, tree)
    return layer


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
) -> SelfAttention2D:
    """Load a layer from a canonical file, whichever framework wrote it, or from anybody's checkpoint.

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
        config, params, block_size=block_size, dtype=dtype, param_dtype=param_dtype, precision=precision
    )


def save(layer: SelfAttention2D, path: PathLike, *, overwrite: bool = False, source: str = "") -> None:
    """Write the layer's weights to a canonical file.

    Args:
        layer: the layer.
        path: the `.safetensors` file; its folder must exist.
        overwrite: whether an existing file may be replaced.
        source: note on the origin of the weights, stored in the file.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
        OSError: if the file cannot be written. An existing file then stays unchanged.
        ValueError: if a weight is not finite.

    Example:
        >>> import tempfile
        >>> layer = SelfAttention2D(16, rngs=nnx.Rngs(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(layer, f"{folder}/layer.safetensors")
        ...     load(f"{folder}/layer.safetensors").config == layer.config
        True
    """
    selfattn_core.save(path, layer.config, to_canonical(layer), overwrite=overwrite, source=source)
