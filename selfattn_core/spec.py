"""The definition: the function and its derivatives in numpy. Every backend is compared with it.

Letters: B batch, H and W sides of the map, C channels, N = H·W positions in row-major order (n = h·W + w), M keys,
Dk and Dv widths of query/key and of value. `∘` is elementwise, `ᵀ` swaps the last two axes, `rowsum` keeps its axis.

    q = x Wq + bq                     (B, N, Dk)
    k = pool(x Wk + bk)               (B, M, Dk)
    v = pool(x Wv + bv)               (B, M, Dv)
    A = softmax over keys of q kᵀ     (B, N, M)      no 1/sqrt(d); each row belongs to an output position, sums to 1
    o = A v                           (B, N, Dv)
    z = o Wo + bo                     (B, N, C)      without an out projection z = o
    y = γ z + x                       (B, H, W, C)

Kernels are (C_in, C_out) matrices: a 1×1 convolution is a matrix product over channels. A config without biases has
b = 0; a config without an out projection has Wo = 1 and bo = 0.

`pool` is max pooling over p×p windows with stride p, p = `kv_pool`; positions beyond the last whole window are
dropped (floor). Each window and channel has one winner. It is the first in row-major order if several are equal, and it
gets the whole gradient. A window that contains NaN gives NaN. M = floor(H/p)·floor(W/p).

With `spectral_norm`, W is not a parameter. It is the raw kernel K over its spectral norm. A state of two vectors per
projection, u (C_out,) and v (C_in,), estimates the norm:

    W = K / σ          σ = vᵀ K u

If vᵀ K u is 0, as it is for a kernel of zeros, σ is the constant 1 and W = K.

This is the layer in evaluation mode, and all functions here compute it. A forward pass in training mode first moves the
state by one power iteration (`power_iteration`), which depends only on the raw kernels and v. Then it computes the same
function. All derivatives treat u and v as constants, but not K in σ.

Everything is computed in the dtype of the arguments, which must all have the same dtype. For 16-bit arguments the
arithmetic is float32, and q, k, v, o, y, K / σ, u and v are rounded to 16 bits when they are stored.
Arrays of dtype object use the arithmetic of their elements, for example fifty-digit decimals.

First derivatives, for ḡ the gradient of y (weight gradients also sum over the batch):

    G = γ ḡ Woᵀ        dA = G vᵀ        D = rowsum(A∘dA)        dS = A∘(dA − D)
    dq = dS k          dk = scatter(dSᵀ q)                      dv = scatter(Aᵀ G)
    dWp = xᵀ dp        dbp = Σ dp       for p = query, key, value
    dWo = γ oᵀ ḡ       dbo = γ Σ ḡ      dγ = Σ ḡ∘z              dx = ḡ + dq Wqᵀ + dk Wkᵀ + dv Wvᵀ
    dK = (dW − ⟨dW, W⟩ v uᵀ) / σ        with spectral norm, for each W; hence ⟨dK, K⟩ = 0
    dK = dW                              where σ is the constant 1

Here `scatter` sends the gradient of a pooled window to its winner, and `gather` reads winners. The key bias adds a
constant to each row of q kᵀ, so its gradient is zero, and no output shows whether it was loaded.

Second derivatives, for ẋ, Ẇ, ḃ and γ̇ the cotangents of dx, dW, db and dγ:

    q̇ = ẋ Wq + x Ẇq + ḃq     k̇ and v̇ likewise, then gather
    U = q̇ kᵀ + q k̇ᵀ          u = rowsum(A∘U)                Ȧ = A∘(U − u)
    ȯ = Ȧ v + A v̇            ż = ȯ Wo + o Ẇo + ḃo           Ġ = γ̇ ḡ Woᵀ + γ ḡ Ẇoᵀ
    R = G v̇ᵀ + Ġ vᵀ          X = (U − u)∘(dA − D) + R       dṠ = A∘(X − rowsum(A∘X))
    ddq = dṠ k + dS k̇        ddk = scatter(dṠᵀ q + dSᵀ q̇)   ddv = scatter(Ȧᵀ G + Aᵀ Ġ)
    to ḡ   γ̇ z + γ ż + ẋ     to γ   Σ ḡ∘ż
    to Wo  γ̇ oᵀ ḡ + γ ȯᵀ ḡ   to bo  γ̇ Σ ḡ
    to Wp  ẋᵀ dp + xᵀ ddp    to bp  Σ ddp                   to x   Σ_p (ddp Wpᵀ + dp Ẇpᵀ)

With spectral norm and K̇ the cotangent of dK, for each W, whose line above gives ddW:

    Ẇ = (K̇ − ⟨K̇, v uᵀ⟩ W) / σ
    to K   (ddW − (⟨ddW, W⟩ + ⟨Ẇ, dW⟩) v uᵀ − ⟨K̇, v uᵀ⟩ dK) / σ

and, where σ is the constant 1, Ẇ = K̇ and to K ddW.

Source: Zhang et al., "Self-Attention Generative Adversarial Networks", 2018, section 3 (equations 1 to 3), whose f is
our key, g our query, h our value and v our out projection; the pooled form is that of the authors' code,
github.com/brain-research/self-attention-gan. The derivatives are ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfattn_core import spectral_norm
from selfattn_core.arrays import Array, is_floating
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.params import check_params, parameter_table, projections

__all__ = ["VERSION", "attention_map", "forward", "magnitudes", "power_iteration", "r1", "vjp", "vjp_of_vjp"]


VERSION = 1
"""The version of the function. It changes whenever the inputs or expected values of a golden vector change."""


def forward(config: SelfAttentionConfig, params: Mapping[str, Array], x: Array) -> Array:
    """The layer's output y.

    Args:
        config: options of the layer.
        params: arrays by canonical name, in the dtype of `x`. `parameter_table(config)` and, with spectral norm,
            `state_table(config)` list them.
        x: feature maps (B, H, W, C).

    Returns:
        y (B, H, W, C), a new array in the dtype of `x`.

    Raises:
        TypeError: if `x` is not floating-point.
        ValueError: if shapes, names or dtypes do not fit.

    Example:
        >>> from selfattn_core import init_params
        >>> config = SelfAttentionConfig(8)
        >>> x = np.ones((2, 3, 5, 8), np.float32)
        >>> bool((forward(config, init_params(config, seed=0), x) == x).all())  # gamma is 0 at first
        True
    """
    layer = Layer(config, params, x)
    return layer.unflatten(layer.store(layer.gamma * layer.z + layer.x))


def attention_map(config: SelfAttentionConfig, params: Mapping[str, Array], x: Array) -> Array:
    """The attention map A.

    Args:
        config: see `forward`.
        params: see `forward`.
        x: feature maps (B, H, W, C).

    Returns:
        A (B, N, M): row n = h·W + w is the output position, column m = h'·W' + w' the attended position on the key
        grid of `config.key_grid(H, W)`. Every row sums to 1.

    Raises:
        TypeError: if `x` is not floating-point.
        ValueError: if shapes, names or dtypes do not fit.

    Example:
        >>> from selfattn_core import init_params
        >>> config = SelfAttentionConfig(8, kv_pool=2)
        >>> attention_map(config, init_params(config, seed=0), np.zeros((2, 4, 6, 8), np.float32))[0, 0]
        array([0.16666667, 0.16666667, 0.16666667, 0.16666667, 0.16666667,
               0.16666667], dtype=float32)
    """
    layer = Layer(config, params, x)
    return layer.A.astype(layer.dtype)


def vjp(config: SelfAttentionConfig, params: Mapping[str, Array], x: Array, dy: Array) -> dict[str, Array]:
    """The gradient of sum(dy∘y) for x and every parameter. With spectral norm, the kernels are the raw ones.

    Args:
        config: see `forward`.
        params: see `forward`.
        x: feature maps (B, H, W, C).
        dy: ḡ, the gradient of y (B, H, W, C).

    Returns:
        {"x": (B, H, W, C), canonical name: array of that parameter's shape}.

    Raises:
        TypeError: if `x` is not floating-point.
        ValueError: if shapes, names or dtypes do not fit.

    Example:
        >>> from selfattn_core import init_params
        >>> config = SelfAttentionConfig(8)
        >>> x = np.ones((1, 2, 3, 8))
        >>> vjp(config, init_params(config, seed=0, dtype=np.float64), x, x)["gamma"].shape
        (1,)
    """
    return FirstOrder(Layer(config, params, x), dy).gradients()


def vjp_of_vjp(
    config: SelfAttentionConfig,
    params: Mapping[str, Array],
    x: Array,
    dy: Array,
    cotangents: Mapping[str, Array],
) -> dict[str, Array]:
    """The gradient of the sum over names of sum(cotangent∘vjp(…)[name]): the derivative of the first derivatives.

    Args:
        config: see `forward`.
        params: see `forward`.
        x: feature maps (B, H, W, C).
        dy: ḡ, the gradient of y (B, H, W, C).
        cotangents: ẋ under "x" and Ẇ, ḃ, γ̇ under canonical names. Absent cotangents are zero.

    Returns:
        {"dy": gradient for ḡ, "x": gradient for x, canonical name: gradient for that parameter}.

    Raises:
        TypeError: if `x` is not floating-point.
        ValueError: if shapes, names or dtypes do not fit.

    Example:
        >>> from selfattn_core import init_params
        >>> config = SelfAttentionConfig(8)
        >>> x = np.ones((1, 2, 3, 8))
        >>> params = init_params(config, seed=0, dtype=np.float64)
        >>> bool((vjp_of_vjp(config, params, x, x, {"x": x})["dy"] == x).all())  # gamma = 0: dx = dy
        True
    """
    layer = Layer(config, params, x)
    return SecondOrder(layer, FirstOrder(layer, dy), cotangents).gradients()


def r1(
    config: SelfAttentionConfig, params: Mapping[str, Array], x: Array, w: Array
) -> tuple[float, dict[str, Array]]:
    """The gradient penalty ‖d sum(w∘y)/dx‖² and its gradient.

    Args:
        config: see `forward`.
        params: see `forward`.
        x: feature maps (B, H, W, C).
        w: weights of the scalar sum(w∘y), (B, H, W, C).

    Returns:
        The sum of squares over the whole batch, and its gradient {"x": …, canonical name: …}.

    Raises:
        TypeError: if `x` is not floating-point.
        ValueError: if shapes, names or dtypes do not fit.

    Source: Mescheder et al., "Which Training Methods for GANs do actually Converge?", 2018, equation 9, without the
    factor and the mean.

    Example:
        >>> from selfattn_core import init_params
        >>> config = SelfAttentionConfig(8)
        >>> x = np.ones((1, 2, 3, 8))
        >>> r1(config, init_params(config, seed=0, dtype=np.float64), x, x)[0]  # gamma = 0: the gradient is w
        48.0
    """
    layer = Layer(config, params, x)
    first = FirstOrder(layer, w)
    dx = first.dx
    gradients = SecondOrder(layer, first, {"x": layer.unflatten(2 * dx)}).gradients()
    del gradients["dy"]
    return float(np.sum(dx * dx)), gradients


def power_iteration(config: SelfAttentionConfig, params: Mapping[str, Array]) -> dict[str, Array]:
    """Move the state as a forward pass in training mode does, before it computes `forward` with the new state.

    Args:
        config: options of the layer. Without spectral norm there is no state, and nothing changes.
        params: see `forward`.

    Returns:
        The same parameters, and new u and v for each projection: u = n(Kᵀ v), then v = n(K u), with
        n(t) = t / max(‖t‖, 1e-12). If t is zero, n(t) is a fixed direction (`selfattn_core.spectral_norm.fallback`).

    Raises:
        ValueError: if shapes, names or dtypes do not fit.

    Example:
        >>> from selfattn_core import init_params
        >>> config = SelfAttentionConfig(16, spectral_norm=True)
        >>> params = init_params(config, seed=0)
        >>> moved = power_iteration(config, params)
        >>> [bool((moved[name] == params[name]).all()) for name in ("value.kernel", "value.v")]
        [True, False]
    """
    moved = _checked(config, params)
    for name in projections(config) if config.spectral_norm else ():
        kernel, v = moved[f"{name}.kernel"], moved[f"{name}.v"]
        dtype = _arithmetic(kernel.dtype)
        state = spectral_norm.power_iteration(kernel.astype(dtype), v.astype(dtype))
        moved[f"{name}.u"], moved[f"{name}.v"] = (vector.astype(v.dtype) for vector in state)
    return moved


def magnitudes(
    config: SelfAttentionConfig,
    params: Mapping[str, Array],
    x: Array,
    dy: Array | None = None,
    *,
    cotangents: Mapping[str, Array] | None = None,
) -> dict[str, float]:
    """The sizes to which rounding errors are proportional.

    The error of the softmax grows with the logits. The gradients of biases and of gamma are sums over positions whose terms
    cancel. For the key bias, and in `r1` for the value bias, they cancel entirely. So their errors are proportional to the
    sums of the absolute terms, not to their values.

    Args:
        config: see `forward`.
        params: see `forward`.
        x: feature maps (B, H, W, C).
        dy: ḡ. Without it only the logits are measured.
        cotangents: cotangents of `vjp_of_vjp`, to measure its gradients instead of those of `vjp`. For `r1` they are
            {"x": 2 dx}.

    Returns:
        {"logits": the largest absolute entry of q kᵀ}. For each bias and for gamma, also the largest over channels of the
        sums of absolute terms.

    Example:
        >>> from selfattn_core import init_params
        >>> config = SelfAttentionConfig(8)
        >>> x = np.ones((1, 2, 3, 8))
        >>> sorted(magnitudes(config, init_params(config, seed=0, dtype=np.float64), x, x))
        ['gamma', 'key.bias', 'logits', 'query.bias', 'value.bias']
    """
    layer = Layer(config, params, x)
    found = {"logits": float(np.abs(layer.q @ _transpose(layer.k)).max(initial=0))}
    if dy is None:
        return found
    order: FirstOrder | SecondOrder
    order = first = FirstOrder(layer, dy)
    z = layer.z
    gain = layer.gamma
    if cotangents is not None:
        order = second = SecondOrder(layer, first, cotangents)
        z, gain = second.dot_z, second.dot_gamma
    terms = dict(order.projected)
    if config.out_projection:
        terms["out"] = gain * first.g
    if config.use_bias:
        found |= {
            f"{name}.bias": float(np.abs(d).sum(axis=(0, 1)).max(initial=0)) for name, d in terms.items()
        }
    return found | {"gamma": float(np.abs(first.g * z).sum())}


class Layer:
    """The forward pass, with the arrays that the derivatives reuse. Maps are flattened to (B, N, ·)."""

    def __init__(self, config: SelfAttentionConfig, params: Mapping[str, Array], x: Array) -> None:
        x = np.asarray(x)
        config.check_input(
            x.shape, layer="spec", dtype=x.dtype, floating=is_floating(x.dtype) or x.dtype == object
        )
        arrays = _checked(config, params)
        given = arrays["gamma"].dtype
        if given != x.dtype:
            raise ValueError(
                f"spec: got x of dtype {x.dtype} and parameters of dtype {given}; expected one dtype: cast one of them."
            )
        self.config = config
        self.dtype = x.dtype
        self.arithmetic = _arithmetic(x.dtype)
        self.shape = x.shape
        self.params = {name: array.astype(self.arithmetic) for name, array in arrays.items()}
        self.kernels = {name: self._kernel(name) for name in projections(config)}
        self.gamma = self.params["gamma"]
        self.pool = _Pool(x.shape[1], x.shape[2], config.kv_pool)
        self.x = self.flatten(x)
        self.q = self.store(self.project("query", self.x))
        key = self.store(self.project("key", self.x))
        value = self.store(self.project("value", self.x))
        self.key_winners, self.value_winners = self.pool.winners(key), self.pool.winners(value)
        self.k = self.pool.gather(key, self.key_winners)
        self.v = self.pool.gather(value, self.value_winners)
        self.attend(config)

    def attend(self, config: SelfAttentionConfig) -> None:
        """A, o and z."""
        self.A = _softmax(self.q @ _transpose(self.k))
        self.o = self.store(self.A @ self.v)
        self.z = self.project("out", self.o) if config.out_projection else self.o

    def row_sums(self, dA: Array, G: Array) -> Array:  # noqa: ARG002 - another layer may use rowsum(G∘o), which is equal
        """D."""
        return _rowsum(self.A * dA)

    def flatten(self, maps: Array) -> Array:
        """(B, H, W, C) to (B, N, C), in the dtype of the arithmetic."""
        batch, height, width, channels = maps.shape
        return maps.astype(self.arithmetic).reshape(batch, height * width, channels)

    def unflatten(self, rows: Array) -> Array:
        """(B, N, C) to (B, H, W, C), in the dtype of the arguments."""
        return rows.reshape(self.shape).astype(self.dtype)

    def store(self, values: Array) -> Array:
        """Round to the dtype of the arguments, as storing does."""
        return values.astype(self.dtype).astype(self.arithmetic)

    def check(self, name: str, array: Array, shape: tuple[int, ...]) -> Array:
        """Check a further argument, and return it in the dtype of the arithmetic."""
        array = np.asarray(array)
        if array.shape != shape or array.dtype != self.dtype:
            raise ValueError(
                f"spec: got {name} of shape {array.shape} and dtype {array.dtype}; "
                f"expected shape {shape} and dtype {self.dtype}."
            )
        return array.astype(self.arithmetic)

    def kernel(self, name: str) -> Array:
        return self.kernels[name].applied

    def _kernel(self, name: str) -> "_Kernel":
        kernel = self.params[f"{name}.kernel"]
        if not self.config.spectral_norm:
            return _Kernel(kernel)
        u, v = self.params[f"{name}.u"], self.params[f"{name}.v"]
        sigma = spectral_norm.sigma(kernel, u, v)
        if sigma == 0:
            return _Kernel(kernel)
        with np.errstate(invalid="ignore"):
            return _Normalised(self.store(kernel / sigma), np.outer(v, u), sigma)

    def project(self, name: str, rows: Array) -> Array:
        projected = rows @ self.kernel(name)
        return projected + self.params[f"{name}.bias"] if self.config.use_bias else projected

    def back_through_out(self, rows: Array) -> Array:
        """Rows times Woᵀ, or the rows themselves without an out projection."""
        return rows @ _transpose(self.kernel("out")) if self.config.out_projection else rows


def _checked(config: SelfAttentionConfig, params: Mapping[str, Array]) -> dict[str, Array]:
    arrays = {name: np.asarray(array) for name, array in params.items()}
    floats = {
        name: array.astype(np.float64) if array.dtype == object else array for name, array in arrays.items()
    }
    fitting = check_params(config, floats, finite=False)
    return {name: arrays[name].reshape(array.shape) for name, array in fitting.items()}


class FirstOrder:
    """Section "First derivatives" of the module docstring, line by line."""

    def __init__(self, layer: Layer, dy: Array) -> None:
        self.layer = layer
        self.g = layer.flatten(layer.check("dy", dy, layer.shape))
        self.G = layer.gamma * layer.back_through_out(self.g)
        self.dA = self.G @ _transpose(layer.v)
        self.D = layer.row_sums(self.dA, self.G)
        self.dS = layer.A * (self.dA - self.D)
        self.projected = {
            "query": self.dS @ layer.k,
            "key": layer.pool.scatter(_transpose(self.dS) @ layer.q, layer.key_winners),
            "value": layer.pool.scatter(_transpose(layer.A) @ self.G, layer.value_winners),
        }
        self.dx = self.g + sum(d @ _transpose(layer.kernel(name)) for name, d in self.projected.items())

    def to_applied(self) -> dict[str, Array]:
        """The gradient of each W."""
        layer = self.layer
        gradients = {name: _outer(layer.x, d) for name, d in self.projected.items()}
        if layer.config.out_projection:
            gradients["out"] = layer.gamma * _outer(layer.o, self.g)
        return gradients

    def gradients(self) -> dict[str, Array]:
        layer = self.layer
        gradients = {f"{name}.kernel": layer.kernels[name].back(dW) for name, dW in self.to_applied().items()}
        gradients |= {f"{name}.bias": _total(d) for name, d in self.projected.items()}
        if layer.config.out_projection:
            gradients["out.bias"] = layer.gamma * _total(self.g)
        gradients["gamma"] = np.sum(self.g * layer.z, keepdims=True).reshape(1)
        return _named(layer, {"x": layer.unflatten(self.dx)}, gradients)


class SecondOrder:
    """Section "Second derivatives" of the module docstring, line by line."""

    def __init__(self, layer: Layer, first: FirstOrder, cotangents: Mapping[str, Array]) -> None:
        self.layer, self.first = layer, first
        shapes = {"x": layer.shape} | {name: row.shape for name, row in parameter_table(layer.config).items()}
        if unknown := sorted(set(cotangents) - set(shapes)):
            raise ValueError(f"spec: got cotangents {unknown}; expected names among {', '.join(shapes)}.")

        def cotangent(name: str) -> Array:
            shape = shapes.get(name, (1,))
            if name not in cotangents:
                return np.zeros(shape, layer.arithmetic)
            return layer.check(f"cotangent of {name}", cotangents[name], shape)

        A, g, gamma = layer.A, first.g, layer.gamma
        self.dot_x = layer.flatten(cotangent("x"))
        self.dot_raw = {name: cotangent(f"{name}.kernel") for name in layer.kernels}
        self.dot_kernel = {name: kernel.along(self.dot_raw[name]) for name, kernel in layer.kernels.items()}
        self.dot_gamma = cotangent("gamma")

        def dot(name: str) -> Array:
            moved = self.dot_x @ layer.kernel(name) + layer.x @ self.dot_kernel[name]
            return np.asarray(moved + cotangent(f"{name}.bias"))

        dot_q = dot("query")
        dot_k = layer.pool.gather(dot("key"), layer.key_winners)
        dot_v = layer.pool.gather(dot("value"), layer.value_winners)
        U = dot_q @ _transpose(layer.k) + layer.q @ _transpose(dot_k)
        centred = U - _rowsum(A * U)
        dot_A = A * centred
        self.dot_o = dot_A @ layer.v + A @ dot_v
        self.dot_z = self.dot_o
        dot_G = self.dot_gamma * layer.back_through_out(g)
        if layer.config.out_projection:
            dot_out = self.dot_kernel["out"]
            self.dot_z = self.dot_o @ layer.kernel("out") + layer.o @ dot_out + cotangent("out.bias")
            dot_G = dot_G + gamma * (g @ _transpose(dot_out))
        R = first.G @ _transpose(dot_v) + dot_G @ _transpose(layer.v)
        X = centred * (first.dA - first.D) + R
        dot_dS = A * (X - _rowsum(A * X))
        self.projected = {
            "query": dot_dS @ layer.k + first.dS @ dot_k,
            "key": layer.pool.scatter(
                _transpose(dot_dS) @ layer.q + _transpose(first.dS) @ dot_q, layer.key_winners
            ),
            "value": layer.pool.scatter(
                _transpose(dot_A) @ first.G + _transpose(A) @ dot_G, layer.value_winners
            ),
        }

    def gradients(self) -> dict[str, Array]:
        layer, first = self.layer, self.first
        g, gamma = first.g, layer.gamma
        to_dy = self.dot_gamma * layer.z + gamma * self.dot_z + self.dot_x
        to_x = sum(
            self.projected[name] @ _transpose(layer.kernel(name))
            + first.projected[name] @ _transpose(self.dot_kernel[name])
            for name in self.projected
        )
        to_applied = {
            name: _outer(self.dot_x, first.projected[name]) + _outer(layer.x, dd)
            for name, dd in self.projected.items()
        }
        if layer.config.out_projection:
            to_applied["out"] = self.dot_gamma * _outer(layer.o, g) + gamma * _outer(self.dot_o, g)
        dW = first.to_applied()
        gradients = {
            f"{name}.kernel": layer.kernels[name].back_twice(ddW, dW[name], self.dot_raw[name])
            for name, ddW in to_applied.items()
        }
        gradients |= {f"{name}.bias": _total(dd) for name, dd in self.projected.items()}
        if layer.config.out_projection:
            gradients["out.bias"] = self.dot_gamma * _total(g)
        gradients["gamma"] = np.sum(g * self.dot_z, keepdims=True).reshape(1)
        return _named(layer, {"dy": layer.unflatten(to_dy), "x": layer.unflatten(to_x)}, gradients)


@dataclass(frozen=True)
class _Kernel:
    """A kernel W that is itself a parameter: `applied` is W, and its gradients are those of the parameter."""

    applied: Array

    def back(self, dW: Array) -> Array:
        """The gradient of the parameter, computed from that of W."""
        return dW

    def along(self, dot: Array) -> Array:
        """Ẇ, computed from the cotangent of the parameter's gradient."""
        return dot

    def back_twice(self, ddW: Array, dW: Array, dot: Array) -> Array:  # noqa: ARG002 - see _Normalised
        """The second-order gradient of the parameter, computed from that of W."""
        return ddW


@dataclass(frozen=True)
class _Normalised(_Kernel):
    """A kernel W = K / σ. `direction` is v uᵀ, the gradient of σ."""

    direction: Array
    sigma: Array

    def back(self, dW: Array) -> Array:
        return np.asarray((dW - np.sum(dW * self.applied) * self.direction) / self.sigma)

    def along(self, dot: Array) -> Array:
        return np.asarray((dot - np.sum(dot * self.direction) * self.applied) / self.sigma)

    def back_twice(self, ddW: Array, dW: Array, dot: Array) -> Array:
        shrink = np.sum(self.along(dot) * dW) * self.direction + np.sum(dot * self.direction) * self.back(dW)
        return np.asarray(self.back(ddW) - shrink / self.sigma)


@dataclass(frozen=True)
class _Pool:
    """Max pooling over p×p windows of flattened maps (B, N, D) to (B, M, D), by the positions of the winners."""

    height: int
    width: int
    side: int

    def winners(self, rows: Array) -> Array | None:
        """Positions n of the winners, (B, M, D), or None without pooling."""
        if self.side == 1:
            return None
        positions = np.arange(self.height * self.width).reshape(self.height, self.width)
        down, across, p = self.height // self.side, self.width // self.side, self.side
        whole = positions[: down * p, : across * p]
        windows = whole.reshape(down, p, across, p).swapaxes(1, 2).reshape(down * across, p * p)
        # argmax takes the first of equal values, and a NaN before any number.
        first = rows[:, windows].argmax(axis=2)
        return np.take_along_axis(windows[None, :, :, None], first[:, :, None], axis=2)[:, :, 0]

    def gather(self, rows: Array, winners: Array | None) -> Array:
        """Read the winners: (B, N, D) to (B, M, D)."""
        return rows if winners is None else np.asarray(np.take_along_axis(rows, winners, axis=1))

    def scatter(self, pooled: Array, winners: Array | None) -> Array:
        """The adjoint of `gather`: (B, M, D) to (B, N, D). Windows do not overlap, so no gradients are added."""
        if winners is None:
            return pooled
        batch, _, width = pooled.shape
        rows = np.zeros_like(pooled, order="C", shape=(batch, self.height * self.width, width))
        np.put_along_axis(rows, winners, pooled, axis=1)
        return rows


def _arithmetic(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of the arithmetic for arguments of this dtype."""
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def _softmax(scores: Array) -> Array:
    """Softmax over the last axis. Rows with an infinite or undefined maximum are NaN."""
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def _transpose(rows: Array) -> Array:
    return np.swapaxes(rows, -1, -2)


def _rowsum(rows: Array) -> Array:
    return np.asarray(rows.sum(axis=-1, keepdims=True))


def _outer(left: Array, right: Array) -> Array:
    """leftᵀ right, summed over the batch: (B, N, D), (B, N, E) to (D, E)."""
    return left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])


def _total(rows: Array) -> Array:
    """Sum over batch and positions: (B, N, D) to (D,)."""
    return np.asarray(rows.sum(axis=(0, 1)))


def _named(layer: Layer, maps: dict[str, Array], gradients: Mapping[str, Array]) -> dict[str, Array]:
    """Put gradients in order: the maps, then the parameters of the config in the order of the table."""
    return maps | {name: gradients[name].astype(layer.dtype) for name in parameter_table(layer.config)}
