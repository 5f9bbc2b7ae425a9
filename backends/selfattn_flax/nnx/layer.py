"""The layer for Flax NNX. `selfattn_core.spec` defines the function that it computes.

Source: Zhang et al., "Self-Attention Generative Adversarial Networks", 2018, section 3.
"""

from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from selfattn_core import SelfAttentionConfig
from selfattn_core.params import projections
from selfattn_flax.functions import pool, residual, rows
from selfattn_flax.projection import KERNEL_INIT, ZEROS_INIT, NNXProjection
from selfattn_flax.spectral_norm import NNXSpectralConv
from selfattn_ops.blocks import check_block_size
from selfattn_ops.jax import attend, attend_with_map


class SelfAttention2D(nnx.Module):
    """Self-attention over the positions of a feature map.

    ```
    A = softmax(query(x) · key(x)ᵀ)        y = gamma · out(A · value(x)) + x
    ```

    The softmax runs over the keys. gamma starts at zero, so a new layer returns
    its input. Unlike `nnx.MultiHeadAttention` there is no 1/sqrt(d) scale, and
    queries and keys can have a different width from values.

    | array | shape |
    |---|---|
    | x, y | (…, H, W, C), any number of leading axes |
    | A | (…, N, M) |

    N = H·W, and M is the number of keys: N, or fewer with `kv_pool`. Row h·W+w
    of A belongs to one output position, its columns to the positions that it
    attends to, and it sums to 1.

    The children `query`, `key`, `value` and, with `out_projection`, `out` are
    1×1 `nnx.Conv`. In the paper f is `key`, g is `query` and h is `value`; much
    PyTorch code calls the query f and the key g. With `spectral_norm` the
    children are `selfattn_flax.spectral_norm.NNXSpectralConv`, which divide
    their raw kernel by its spectral norm.

    Args:
        in_features: C.
        qk_channels: Dk, by default C // 8.
        value_channels: Dv, by default C.
        out_projection: whether `out` maps A · value(x) from Dv back to C
            channels. Required if Dv differs from C.
        use_bias: whether the projections have biases.
        kv_pool: size of the max-pooling window over key and value; 1 means no
            pooling.
        spectral_norm: whether each kernel is divided by its spectral norm. A
            call in training mode improves the estimate of the norm, kept in
            `nnx.BatchStat` variables, by one power iteration; a call in
            evaluation mode changes nothing. As with `nnx.BatchNorm`, a new
            layer is in training mode: see `train` and `eval`.
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
        rngs: source of the initial parameters.

    Raises:
        ValueError: if the options do not make a layer, or (when called) the
            input's shape does not fit.
        TypeError: if the input is not floating-point.

    Example:
        >>> layer = SelfAttention2D(64, rngs=nnx.Rngs(0))
        >>> x = jax.random.normal(jax.random.key(1), (2, 5, 7, 64))
        >>> bool((layer(x) == x).all())  # gamma is 0 at first
        True
        >>> y, sown = nnx.capture(layer, nnx.Intermediate)(x, sow_weights=True)
        >>> sown["attention_weights"][0].shape
        (2, 35, 35)
    """

    def __init__(
        self,
        in_features: int,
        qk_channels: int | None = None,
        value_channels: int | None = None,
        *,
        out_projection: bool = False,
        use_bias: bool = True,
        kv_pool: int = 1,
        spectral_norm: bool = False,
        block_size: int | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        kernel_init: Initializer = KERNEL_INIT,
        bias_init: Initializer = ZEROS_INIT,
        gamma_init: Initializer = ZEROS_INIT,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = SelfAttentionConfig(
            in_features,
            qk_channels,
            value_channels,
            out_projection=out_projection,
            use_bias=use_bias,
            kv_pool=kv_pool,
            spectral_norm=spectral_norm,
        )
        self.block_size = check_block_size(block_size)
        self.dtype = dtype
        conv = NNXSpectralConv if spectral_norm else NNXProjection
        for name, widths in projections(self.config).items():
            child = conv(
                *widths,
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                precision=precision,
                kernel_init=kernel_init,
                bias_init=bias_init,
                rngs=rngs,
            )
            setattr(self, name, child)
        self.gamma = nnx.Param(gamma_init(rngs.params(), (1,), param_dtype))

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
        rngs: nnx.Rngs,
    ) -> Self:
        """A new layer of this config."""
        return cls(
            config.channels,
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
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, *, sow_weights: bool = False) -> jax.Array:
        """The output. On request the map is sown, which takes N·M numbers of memory.

        Args:
            x: (…, H, W, C).
            sow_weights: whether to sow A as the `nnx.Intermediate` "attention_weights", for `nnx.capture` to collect.
        """
        y, attention = self._forward(x, with_map=sow_weights)
        if sow_weights:
            self.sow(nnx.Intermediate, "attention_weights", attention)
        return y

    def _forward(self, x: jax.Array, *, with_map: bool) -> tuple[jax.Array, jax.Array | None]:
        """The output and, on request, the map."""
        x = jnp.asarray(x)
        self.config.check_input(
            x.shape,
            layout="…HWC",
            layer="SelfAttention2D",
            dtype=x.dtype,
            floating=jnp.issubdtype(x.dtype, jnp.floating),
        )
        query = rows(self.query(x))  # (…, N, Dk)
        key = rows(pool(self.key(x), self.config.kv_pool))  # (…, M, Dk)
        value = rows(pool(self.value(x), self.config.kv_pool))  # (…, M, Dv)
        query, key, value = promote_dtype((query, key, value), dtype=self.dtype)
        attention = None
        if with_map:
            attended, attention = attend_with_map(query, key, value, block_size=self.block_size)
        else:
            attended = attend(query, key, value, block_size=self.block_size)  # (…, N, Dv)
        attended = attended.reshape(*x.shape[:-1], attended.shape[-1])  # (…, H, W, Dv)
        if self.config.out_projection:
            attended = self.out(attended)  # (…, H, W, C)
        return residual(self.gamma[...], attended, x, self.dtype), attention
