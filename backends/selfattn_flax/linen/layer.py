"""The layer for Flax Linen. `selfattn_core.spec` defines the function that it computes.

Source: Zhang et al., "Self-Attention Generative Adversarial Networks", 2018, section 3.
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY
from functools import partial
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from selfattn_core import SelfAttentionConfig
from selfattn_core.config import check_options
from selfattn_core.params import projections
from selfattn_flax.functions import pool, residual, rows
from selfattn_flax.projection import KERNEL_INIT, ZEROS_INIT, LinenProjection
from selfattn_flax.spectral_norm import LinenSpectralConv
from selfattn_ops.blocks import check_block_size
from selfattn_ops.jax import attend, attend_with_map


class SelfAttention2D(nn.Module):
    """Self-attention over the positions of a feature map.

    ```
    A = softmax(query(x) · key(x)ᵀ)        y = gamma · out(A · value(x)) + x
    ```

    The softmax runs over the keys. gamma starts at zero, so a new layer returns
    its input. Unlike `nn.MultiHeadDotProductAttention` there is no 1/sqrt(d)
    scale, and queries and keys can have a different width from values.

    | array | shape |
    |---|---|
    | x, y | (…, H, W, C), any number of leading axes |
    | A | (…, N, M) |

    N = H·W, and M is the number of keys: N, or fewer with `kv_pool`. Row h·W+w
    of A belongs to one output position, its columns to the positions that it
    attends to, and it sums to 1.

    The children `query`, `key`, `value` and, with `out_projection`, `out` are
    1×1 `nn.Conv`. In the paper f is `key`, g is `query` and h is `value`; much
    PyTorch code calls the query f and the key g. With `spectral_norm` the
    children are `selfattn_flax.spectral_norm.LinenSpectralConv`, which divide
    their raw kernel by its spectral norm. The parameters have the same tree as
    those of `selfattn_flax.SelfAttention2D`.

    Args:
        qk_channels: Dk, by default C // 8.
        value_channels: Dv, by default C.
        out_projection: whether `out` maps A · value(x) from Dv back to C
            channels. Required if Dv differs from C.
        use_bias: whether the projections have biases.
        kv_pool: size of the max-pooling window over key and value; 1 means no
            pooling.
        spectral_norm: whether each kernel is divided by its spectral norm. The
            collection "batch_stats" then holds the estimate of the norms, and
            `use_running_average` must be given, as for `nn.BatchNorm`: False,
            with `mutable=["batch_stats"]`, improves the estimate by one power
            iteration; True changes nothing.
        block_size: how many query positions are computed at a time; None
            chooses by size. Changes memory, not the result.
        dtype: dtype of the computation and of y, by default promoted from x and
            the parameters. The softmax and the residual are always computed in
            at least float32.
        param_dtype: dtype of the parameters.
        precision: precision of the projections. The attention itself is always
            computed in full precision, even under a lower
            `jax_default_matmul_precision`.
        kernel_init: initialiser of the kernels.
        bias_init: initialiser of the biases.
        gamma_init: initialiser of gamma.
        use_running_average: with `spectral_norm`, whether the layer is in
            evaluation (True) or in training (False). Give it here, or when the
            layer is called.

    Raises:
        ValueError: if the options do not make a layer, or (when called) the
            input's shape does not fit.
        TypeError: if the input is not floating-point.

    Example:
        >>> layer = SelfAttention2D()
        >>> x = jax.random.normal(jax.random.key(1), (2, 5, 7, 64))
        >>> variables = layer.init(jax.random.key(0), x)
        >>> bool((layer.apply(variables, x) == x).all())  # gamma is 0 at first
        True
        >>> y, sown = layer.apply(
        ...     variables, x, sow_weights=True, mutable=["intermediates"]
        ... )
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
        """Refuse options that are invalid for every number of channels."""
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
        """A new module of this config. Its number of channels still follows from the input."""
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
        """The config of a module that is bound to initialised variables.

        Raises:
            ValueError: if the module is not bound, so its number of channels is unknown.
        """
        if self.scope is None or not self.has_variable("params", "query"):
            raise ValueError(
                "SelfAttention2D: the number of channels is unknown until the module is bound to initialised variables. Use "
                "module.bind(variables).config, or read config inside a call of the module."
            )
        return config_of(self, _channels(self.get_variable("params", "query")))

    @nn.compact
    def __call__(
        self, x: jax.Array, *, sow_weights: bool = False, use_running_average: bool | None = None
    ) -> jax.Array:
        """The output. On request the map is sown, which takes N·M numbers of memory.

        Args:
            x: (…, H, W, C).
            sow_weights: whether to sow A as "attention_weights" into the collection "intermediates".
            use_running_average: as in the constructor. Give it here if it is not given there. Ignored without
                `spectral_norm`.
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
        return config_of(self, shape[-1])


def config_of(module: SelfAttention2D, channels: int) -> SelfAttentionConfig:
    """The config of a module for inputs with this number of channels."""
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
    """C, read from the parameters of the query projection."""
    return int(nn.meta.unbox(query)["kernel"].shape[-2])
