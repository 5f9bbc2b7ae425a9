"""1×1 convolutions divided by their spectral norm, for NNX and Linen, with the numerics of `selfattn_core.spectral_norm`.

Both apply kernel / sigma, sigma = vᵀ K u, where K is `kernel` as (C_in, C_out). `kernel` is the raw kernel, and it is
trained. A call with `use_running_average=False` first moves u and v by one power iteration. A call with True does not. The
gradient treats u and v as constants and goes through K in sigma. If vᵀ K u is 0, as for a kernel of zeros, sigma is the
constant 1. Unlike Flax's own two `SpectralNorm`, these layers do not change the raw kernel, and do not iterate in evaluation.
"""

from dataclasses import KW_ONLY
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from selfattn_core.spectral_norm import EPS, WARM_UP, converged, fallback
from selfattn_flax.projection import KERNEL_INIT, ZEROS_INIT, LinenProjection, NNXProjection, project

__all__ = ["LinenSpectralConv", "NNXSpectralConv", "converged_state", "refresh_spectral_norm"]


class NNXSpectralConv(NNXProjection):
    """A 1×1 `nnx.Conv` with spectral norm. u (C_out,) and v (C_in,) are `nnx.BatchStat`, like the state of `nnx.BatchNorm`.

    It starts in training mode. `train()`, `eval()` and `nnx.view(…, use_running_average=True)` change that.

    Args:
        in_features: C_in.
        out_features: C_out.
        use_bias: whether there is a bias.
        dtype: dtype of the computation, by default promoted from the inputs and the parameters.
        param_dtype: dtype of the parameters and the state.
        precision: precision of the product of inputs and kernel.
        kernel_init: initialiser of the kernel.
        bias_init: initialiser of the bias.
        rngs: source of the initial parameters and the initial v.

    Example:
        >>> conv = NNXSpectralConv(6, 3, rngs=nnx.Rngs(0))
        >>> for _ in range(100):
        ...     y = conv(jnp.ones((1, 2, 2, 6)))
        >>> conv.eval()
        >>> round(float(jnp.linalg.norm(conv.normalised_kernel()[0, 0], 2)), 3)
        1.0
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        kernel_init: Initializer = KERNEL_INIT,
        bias_init: Initializer = ZEROS_INIT,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        u = _initial_u(rngs.params(), self.kernel[...])
        self.u = nnx.BatchStat(u)
        self.v = nnx.BatchStat(_following_v(self.kernel[...], u))
        self.use_running_average = False

    def normalised_kernel(self) -> jax.Array:
        """The divided kernel (1, 1, C_in, C_out). In training mode, one power iteration runs first."""
        kernel = self.kernel[...]
        if not self.use_running_average:
            self.u[...], self.v[...] = _power_iteration(kernel, self.v[...])
        return _normalised(kernel, self.u[...], self.v[...])

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """The convolution of the inputs (…, C_in). On an explicit mesh, `out_sharding` is its sharding."""
        bias = None if self.bias is None else self.bias[...]
        kernel = self.normalised_kernel()
        return project(inputs, kernel, bias, self.dtype, self.precision, out_sharding)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Set the mode. `nnx.view` calls it."""
        if use_running_average is not None:
            self.use_running_average = use_running_average


class LinenSpectralConv(LinenProjection):
    """A 1×1 `nn.Conv` with spectral norm. u (C_out,) and v (C_in,) are in "batch_stats", like the state of `nn.BatchNorm`.

    Args:
        use_running_average: False moves u and v first, except during initialisation, which only creates them. The other
            fields are those of `LinenProjection`.

    Example:
        >>> x = jnp.ones((1, 2, 2, 6))
        >>> conv = LinenSpectralConv(3, use_running_average=False)
        >>> variables = conv.init(jax.random.key(0), x)
        >>> y, moved = conv.apply(variables, x, mutable=["batch_stats"])
        >>> sorted(moved["batch_stats"])
        ['u', 'v']
    """

    _: KW_ONLY
    use_running_average: bool = True

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The convolution of the inputs (…, C_in)."""
        kernel, bias = self.weights(inputs.shape[-1])
        u = self.variable("batch_stats", "u", lambda: _initial_u(self.make_rng("params"), kernel))
        v = self.variable("batch_stats", "v", lambda: _following_v(kernel, u.value))
        if not (self.use_running_average or self.is_initializing()):
            u.value, v.value = _power_iteration(kernel, v.value)
        return project(inputs, _normalised(kernel, u.value, v.value), bias, self.dtype, self.precision)


def refresh_spectral_norm(model: nnx.Module) -> None:
    """Recompute the state of every spectral norm in a module for its current kernel.

    Call it after you set kernels outside training: reinitialised, averaged, or restored without their `nnx.BatchStat`, which
    `nnx.update` accepts silently. The old state belongs to other kernels, and the first outputs in evaluation mode could be
    wrong by any factor.

    Args:
        model: a layer or a whole model, outside jitted functions. Only our modules change; `nnx.SpectralNorm` does not.

    Example:
        >>> conv = NNXSpectralConv(6, 3, rngs=nnx.Rngs(0))
        >>> conv.kernel[...] = 7 * jax.random.normal(jax.random.key(1), conv.kernel.shape)
        >>> refresh_spectral_norm(conv)
        >>> conv.eval()
        >>> round(float(jnp.linalg.norm(conv.normalised_kernel()[0, 0], 2)), 3)
        1.0
    """
    for _, each in nnx.iter_graph(model):
        if isinstance(each, NNXSpectralConv):
            each.u[...], each.v[...] = converged_state(each.kernel[...])


def converged_state(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The limits of u and v under power iterations on a kernel (1, 1, C_in, C_out), in its dtype.

    Example:
        >>> [vector.shape for vector in converged_state(jnp.ones((1, 1, 6, 3)))]
        [(3,), (6,)]
    """
    u, v = converged(np.asarray(_matrix(kernel)))
    return jnp.asarray(u, kernel.dtype), jnp.asarray(v, kernel.dtype)


def _initial_u(key: jax.Array, kernel: jax.Array) -> jax.Array:
    """The u of a new layer, from power iterations on its kernel that start at a standard normal v."""
    matrix = _matrix(kernel)
    v = jax.random.normal(key, matrix.shape[:1], matrix.dtype)
    u = jax.lax.fori_loop(0, WARM_UP - 1, lambda _, u: _forth(matrix, _back(matrix, u)), _forth(matrix, v))
    return u.astype(kernel.dtype)


def _following_v(kernel: jax.Array, u: jax.Array) -> jax.Array:
    """The v that belongs to an initial u."""
    matrix = _matrix(kernel)
    return _back(matrix, u.astype(matrix.dtype)).astype(u.dtype)


def _power_iteration(kernel: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The state after one more power iteration."""
    # Never differentiated, because the root of a vector of zeros has no derivative.
    matrix = jax.lax.stop_gradient(_matrix(kernel))
    u = _forth(matrix, v.astype(matrix.dtype))
    return u.astype(v.dtype), _back(matrix, u).astype(v.dtype)


def _normalised(kernel: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    """The kernel over sigma."""
    matrix = _matrix(kernel)
    u, v = (jax.lax.stop_gradient(vector.astype(matrix.dtype)) for vector in (u, v))
    sigma = jnp.sum(matrix * v[:, None] * u)
    return (matrix / jnp.where(sigma != 0, sigma, 1)).astype(kernel.dtype)[None, None]


def _matrix(kernel: jax.Array) -> jax.Array:
    """The kernel as a matrix (C_in, C_out), in at least float32."""
    return kernel[0, 0].astype(jnp.promote_types(kernel.dtype, jnp.float32))


# Products and sums, because an accelerator may round a matrix product.
def _forth(matrix: jax.Array, v: jax.Array) -> jax.Array:
    return _unit(jnp.sum(matrix * v[:, None], 0))


def _back(matrix: jax.Array, u: jax.Array) -> jax.Array:
    return _unit(jnp.sum(matrix * u, 1))


def _unit(vector: jax.Array) -> jax.Array:
    instead = jnp.asarray(fallback(vector.shape[0]), vector.dtype)
    vector = jnp.where(jnp.any(vector != 0), vector, instead)
    return vector / jnp.maximum(jnp.sqrt(jnp.sum(vector**2)), EPS)
