"""The layer for Flax Linen, with its weights; the function is defined in `selfattn_core.spec`.

Source: Zhang et al., "Self-Attention Generative Adversarial Networks", 2018, section 3.
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY
from functools import partial
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.linen.dtypes import promote_dtype
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from numpy.typing import NDArray

import selfattn_core
from selfattn_core import SelfAttentionConfig
from selfattn_core.config import check_options
from selfattn_core.params import check_params, projections, state_table
from selfattn_core.porting.load import load_any
from selfattn_core.weights import PathLike
from selfattn_flax.maps import unflatten
from selfattn_flax.nnx import pool, residual, rows
from selfattn_flax.projection import KERNEL_INIT, ZEROS_INIT, LinenProjection
from selfattn_flax.spectral_norm import LinenSpectralConv, converged_state
from selfattn_flax.weights import to_numpy, to_tree
from selfattn_ops.blocks import check_block_size
from selfattn_ops.jax import attend, attend_with_map

__all__ = [
    "SelfAttention2D",
    "attention_grid",
    "from_canonical",
    "load",
    "refresh_spectral_norm",
    "save",
    "to_canonical",
]

Array = NDArray[Any]


class SelfAttention2D(nn.Module):
    """Self-attention over the positions of a feature map, with a residual gain that starts at zero.

    ```
    A = softmax(query(x) · key(x)ᵀ)        y = gamma · out(A · value(x)) + x
    ```

    Unlike `nn.MultiHeadDotProductAttention` there is no 1/sqrt(d) scale, and the widths of query/key and of value
    differ. The children `query`, `key`, `value` (and `out`) are 1×1 `nn.Conv`; the paper's f is `key` and its g
    is `query`, much PyTorch code has them the other way round, and the paper's h is `value`. The parameters are the
    tree of `selfattn_flax.SelfAttention2D`. With `spectral_norm` the children are
    `selfattn_flax.spectral_norm.LinenSpectralConv`, which apply their raw kernel over its spectral norm.

    | array | shape |
    |---|---|
    | x, y | (…, H, W, C), any number of leading axes |
    | A | (…, N, M): row = output position h·W + w, column = attended position, rows sum to 1 |

    Args:
        qk_channels: Dk, by default C // 8.
        value_channels: Dv, by default C.
        out_projection: whether `out` takes A v from Dv back to C channels; needed where Dv differs from C.
        use_bias: whether the projections have biases.
        kv_pool: side of the max-pooling window over key and value; 1 is none.
        spectral_norm: whether the kernels are divided by their spectral norms. The collection "batch_stats" then holds
            the estimate of the norms, and `use_running_average` must be given, as for `nn.BatchNorm`: False, with
            `mutable=["batch_stats"]`, improves the estimate by one power iteration; True changes nothing.
        block_size: query positions attended from at a time; None chooses by size. Changes memory, not the result.
        dtype: of the computation and of y; by default promoted from x and the parameters. Whatever it is, the softmax
            and the residual are computed in at least float32.
        param_dtype: of the parameters.
        precision: of the projections; attention itself is always computed in full, also under a lower
            `jax_default_matmul_precision`.
        kernel_init: of the kernels.
        bias_init: of the biases.
        gamma_init: of gamma.
        use_running_average: with `spectral_norm`, whether the layer is in evaluation (True) or in training (False);
            here, or when it is called.

    Raises:
        ValueError: if the options do not make a layer, or (when called) the input's shape does not fit.
        TypeError: if the input is not floating-point.

    Example:
        >>> layer = SelfAttention2D()
        >>> x = jax.random.normal(jax.random.key(1), (2, 5, 7, 64))
        >>> variables = layer.init(jax.random.key(0), x)
        >>> bool((layer.apply(variables, x) == x).all())  # gamma is 0 at first
        True
        >>> y, sown = layer.apply(variables, x, sow_weights=True, mutable=["intermediates"])
        >>> sown["intermediates"]["attention_weights"][0].shape
        (2, 35, 35)
    """

    qk_channels: int | None = None
    value_channels: int | None = None
    _: KW_ONLY
    out_projection: bool = False
    use_bias: bool = True
    kv_pool: int = 1
    spectral_norm: bool = False
    block_size: int | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: jax.lax.PrecisionLike = None
    kernel_init: Initializer = KERNEL_INIT
    bias_init: Initializer = ZEROS_INIT
    gamma_init: Initializer = ZEROS_INIT
    use_running_average: bool | None = None

    def __post_init__(self) -> None:
        """Refuse options that no number of channels could mend."""
        check_options(
            self.qk_channels,
            self.value_channels,
            out_projection=self.out_projection,
            use_bias=self.use_bias,
            kv_pool=self.kv_pool,
            spectral_norm=self.spectral_norm,
        )
        check_block_size(self.block_size)
        super().__post_init__()

    @classmethod
    def from_config(
        cls,
        config: SelfAttentionConfig,
        *,
        block_size: int | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        kernel_init: Initializer = KERNEL_INIT,
        bias_init: Initializer = ZEROS_INIT,
        gamma_init: Initializer = ZEROS_INIT,
        use_running_average: bool | None = None,
        name: str | None = None,
    ) -> Self:
        """A new module of this config; its channels follow from the input all the same."""
        return cls(
            config.qk_channels,
            config.value_channels,
            out_projection=config.out_projection,
            use_bias=config.use_bias,
            kv_pool=config.kv_pool,
            spectral_norm=config.spectral_norm,
            block_size=block_size,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            gamma_init=gamma_init,
            use_running_average=use_running_average,
            name=name,
        )

    @property
    def config(self) -> SelfAttentionConfig:
        """The config, of a module that is bound to initialised variables.

        Raises:
            ValueError: if it is not, so that the number of channels is not known.
        """
        if self.scope is None or not self.has_variable("params", "query"):
            raise ValueError(
                "SelfAttention2D: its channels are not known before it is bound to initialised variables: use "
                "module.bind(variables).config, or read it in a call of the module."
            )
        return _config(self, _channels(self.get_variable("params", "query")))

    @nn.compact
    def __call__(
        self, x: jax.Array, *, sow_weights: bool = False, use_running_average: bool | None = None
    ) -> jax.Array:
        """The output; on request the map is sown, which takes N·M numbers of memory.

        Args:
            x: (…, H, W, C).
            sow_weights: whether to sow A as "attention_weights" into the collection "intermediates".
            use_running_average: as in the constructor, where it is not given there; ignored without `spectral_norm`.
        """
        x = jnp.asarray(x)
        config = self.config if self.has_variable("params", "query") else self._inferred(x.shape)
        config.check_input(
            x.shape,
            layout="…HWC",
            layer="SelfAttention2D",
            dtype=x.dtype,
            floating=jnp.issubdtype(x.dtype, jnp.floating),
        )
        conv: Any = LinenProjection
        if self.spectral_norm:
            evaluates = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
            conv = partial(LinenSpectralConv, use_running_average=evaluates)
        convs = {
            name: conv(
                channels,
                use_bias=self.use_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                precision=self.precision,
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
                name=name,
            )
            for name, (_, channels) in projections(config).items()
        }
        query = rows(convs["query"](x))  # (…, N, Dk)
        key = rows(pool(convs["key"](x), self.kv_pool))  # (…, M, Dk)
        value = rows(pool(convs["value"](x), self.kv_pool))  # (…, M, Dv)
        query, key, value = promote_dtype(query, key, value, dtype=self.dtype)
        if sow_weights:
            attended, attention = attend_with_map(query, key, value, block_size=self.block_size)
            self.sow("intermediates", "attention_weights", attention)
        else:
            attended = attend(query, key, value, block_size=self.block_size)  # (…, N, Dv)
        attended = attended.reshape(*x.shape[:-1], attended.shape[-1])  # (…, H, W, Dv)
        if self.out_projection:
            attended = convs["out"](attended)  # (…, H, W, C)
        gamma = self.param("gamma", self.gamma_init, (1,), self.param_dtype)
        return residual(gamma, attended, x, self.dtype)

    def _inferred(self, shape: tuple[int, ...]) -> SelfAttentionConfig:
        if len(shape) < 3:
            raise ValueError(
                f"SelfAttention2D: got input of shape {shape}; expected (…, H, W, C): its rank is {len(shape)}."
            )
        return _config(self, shape[-1])


def attention_grid(module: SelfAttention2D, variables: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """The layer's map of x, unflattened: `grid[b, h, w]` is where output position (h, w) attends.

    Args:
        module: the layer, not bound; it is taken in evaluation.
        variables: its variables.
        x: (…, H, W, C).

    Returns:
        (…, H, W, H', W'); H' = H // kv_pool and W' = W // kv_pool. The last two axes sum to 1. It is the layer's map
        in N·M numbers of memory, and can be differentiated.

    Raises:
        ValueError: if the input's shape does not fit.
        TypeError: if the input is not floating-point.

    Example:
        >>> module = SelfAttention2D(kv_pool=2)
        >>> x = jax.random.normal(jax.random.key(1), (3, 5, 8, 16))
        >>> attention_grid(module, module.init(jax.random.key(0), x), x).shape
        (3, 5, 8, 2, 4)
    """
    module = module.clone(use_running_average=True)
    _, sown = module.apply(variables, x, sow_weights=True, mutable=["intermediates"])
    attention = sown["intermediates"]["attention_weights"][0]
    return unflatten(module.bind(variables).config, attention, jnp.shape(x))


def to_canonical(module: SelfAttention2D, variables: Mapping[str, Any]) -> dict[str, Array]:
    """The layer's weights, and with spectral norm its state, as new, contiguous numpy arrays by canonical name.

    Args:
        module: the layer, bound or not.
        variables: its variables, {"params": {"query": …, …}} and with spectral norm {"batch_stats": …}, with or
            without partitioning metadata; bfloat16 is widened to float32, which is exact.

    Returns:
        Kernels (C_in, C_out), biases (C_out,), gamma (1,); with spectral norm the kernels are the raw ones.

    Raises:
        ValueError: if the variables are not those of this module; lists every problem.

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
        config: which layer.
        params: arrays by canonical name.
        block_size: as in `SelfAttention2D`.
        dtype: of the computation, as in `SelfAttention2D`.
        param_dtype: of the parameters; by default that of the arrays.
        precision: as in `SelfAttention2D`.
        name: of the module.

    Raises:
        ValueError: if the arrays do not fit the config (lists every problem), or are float64 while JAX has no float64.

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
    """The same variables, in which every estimate of a spectral norm is that of its kernel.

    To be called after kernels came from outside the training: drawn anew, averaged, or restored without their
    "batch_stats". The state belongs to other kernels then, and the first outputs in evaluation are off by any factor.

    Args:
        variables: of a layer or of a whole model, {"params": …, "batch_stats": …}, outside of jitted functions; the
            "batch_stats" may be those that `init` gave. The state of other modules stays as it is.

    Returns:
        A new dict; what has not changed is shared.

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
    """A module and variables from a canonical file, whichever framework wrote it, or from anybody's checkpoint.

    Args:
        path: a canonical `.safetensors` file, or with `dialect` a checkpoint in any format that `selfattn inspect` reads.
        block: which layer of a canonical file that holds several.
        dialect: what another file is, as `selfattn dialects` lists them, or a `.toml` file of your own.
        prefix: which block of such a file, where it has several.
        settings: what such a file does not say, for example {"use_scale": False}.
        strict: whether tensors under the prefix that nothing reads are an error.
        block_size: as in `SelfAttention2D`.
        dtype: of the computation, as in `SelfAttention2D`.
        param_dtype: of the parameters; by default the file's.
        precision: as in `SelfAttention2D`.
        name: of the module.

    Warns:
        UserWarning: if stored vectors u and v of spectral norm have not the length 1, as averages of them have; or if a
            file of a layer of this library does not say its `kv_pool`, and `settings` do not either.

    Raises:
        FileNotFoundError: if there is no such canonical file.
        ValueError: if it is not a whole and fitting file of its kind (lists every problem), or holds float64 while JAX
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
        variables: its variables.
        path: the `.safetensors` file; its folder must exist.
        overwrite: whether an existing file may be replaced.
        source: where the weights came from, for the reader.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
        OSError: if it cannot be written; an existing file is left as it was.
        ValueError: if the variables are not those of this module, or a weight is not finite.

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


def _config(module: SelfAttention2D, channels: int) -> SelfAttentionConfig:
    return SelfAttentionConfig(
        channels,
        module.qk_channels,
        module.value_channels,
        out_projection=module.out_projection,
        use_bias=module.use_bias,
        kv_pool=module.kv_pool,
        spectral_norm=module.spectral_norm,
    )


def _channels(query: Mapping[str, Any]) -> int:
    """C, from the parameters of the query projection."""
    return int(nn.meta.unbox(query)["kernel"].shape[-2])


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
    config = _config(module, arrays["query.kernel"].shape[0])
    return config, check_params(config, arrays, finite=False)
