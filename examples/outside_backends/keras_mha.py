"""Keras' own `MultiHeadAttention` as a backend of the conformance kit.

    selfattn conform examples.outside_backends.keras_mha:Backend

One head over all positions is the layer without gamma, residual and pooling. Keras divides the scores by sqrt(Dk), so the
query is multiplied by sqrt(Dk). If the config has no out projection, that of Keras is the identity. Nothing from selfattn
is imported.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

# The derivatives below need JAX. A backend has its own process, so it may choose the framework.
os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
import numpy as np

__all__ = ["Backend", "Layer"]

Params = dict[str, jax.Array]


# Compared by identity, because JAX compiles functions for each instance.
@dataclass(frozen=True, eq=False)
class Layer:
    """Keras' layer as a function of canonical weights.

    Args:
        config: config with the widths.
        attend: the layer, built for these widths.
    """

    config: Any
    attend: keras.layers.MultiHeadAttention

    def __call__(self, params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The output y (B, H, W, C) and the map (B, N, N)."""
        channels, dtype = self.config.channels, x.dtype
        scale = jnp.sqrt(jnp.asarray(self.config.qk_channels, dtype))
        weights = {
            "query/kernel": params["query.kernel"][:, None] * scale,
            "key/kernel": params["key.kernel"][:, None],
            "value/kernel": params["value.kernel"][:, None],
            "attention_output/kernel": params.get("out.kernel", jnp.eye(channels, dtype=dtype))[None],
        }
        if self.config.use_bias:
            weights |= {
                "query/bias": params["query.bias"][None] * scale,
                "key/bias": params["key.bias"][None],
                "value/bias": params["value.bias"][None],
                "attention_output/bias": params.get("out.bias", jnp.zeros(channels, dtype)),
            }
        values = [weights["/".join(each.path.split("/")[-2:])] for each in self.attend.trainable_variables]
        state = [each.value for each in self.attend.non_trainable_variables]
        (attended, scores), _ = self.attend.stateless_call(values, state, x, x, return_attention_scores=True)
        batch, height, width, _ = x.shape
        return params["gamma"] * attended + x, scores.reshape(batch, height * width, height * width)


Model = tuple[Layer, Params]


@partial(jax.jit, static_argnums=0)
def _call(layer: Layer, params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return layer(params, x)


@partial(jax.jit, static_argnums=0)
def _vjp(layer: Layer, params: Params, x: jax.Array, dy: jax.Array) -> tuple[Params, jax.Array]:
    _, pullback = jax.vjp(lambda params, x: layer(params, x)[0], params, x)
    by_params, by_x = pullback(dy)
    return by_params, by_x


@partial(jax.jit, static_argnums=0)
def _r1(
    layer: Layer, params: Params, x: jax.Array, w: jax.Array
) -> tuple[jax.Array, tuple[Params, jax.Array]]:
    def penalty(params: Params, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.grad(lambda x: jnp.sum(w * layer(params, x)[0]))(x) ** 2)

    return jax.value_and_grad(penalty, (0, 1))(params, x)


class Backend:
    """The backend that the kit calls."""

    name = "Keras MultiHeadAttention"

    def versions(self) -> Mapping[str, str]:
        """Versions for the report."""
        return {"keras": keras.__version__, "jax": jax.__version__}

    def claims(self) -> frozenset[str]:
        """Everything except the table of parameters, because this layer has other parameter names."""
        return frozenset({"forward", "map", "vjp", "r1"})

    def layouts(self) -> tuple[str, ...]:
        """Axes in the order of `MultiHeadAttention`: features last."""
        return ("channels_last",)

    def declines(self, config: Any) -> str:
        """Why there is no layer for this config. The kit lists its cases as unclaimed, with this reason."""
        return "MultiHeadAttention cannot pool keys after projecting them" if config.kv_pool > 1 else ""

    def build(self, config: Any, params: Mapping[str, np.ndarray], dtype: str, layout: str) -> Model:  # noqa: ARG002
        """The layer, built for the widths of the config."""
        attend = keras.layers.MultiHeadAttention(
            1,
            config.qk_channels,
            value_dim=config.value_channels,
            output_shape=config.channels,
            use_bias=config.use_bias,
            dtype=dtype,
        )
        shape = (None, None, None, config.channels)
        attend.build(shape, shape)
        return Layer(config, attend), _arrays(params)

    def update(self, model: Model, params: Mapping[str, np.ndarray]) -> Model:
        """The same layer with other weights. Functions compiled for it stay valid."""
        return model[0], _arrays(params)

    def forward(self, model: Model, x: np.ndarray) -> np.ndarray:
        """The output y."""
        return np.asarray(_call(*model, jnp.asarray(x))[0])

    def attention_map(self, model: Model, x: np.ndarray) -> np.ndarray:
        """The map A."""
        return np.asarray(_call(*model, jnp.asarray(x))[1])

    def vjp(self, model: Model, x: np.ndarray, dy: np.ndarray) -> Mapping[str, np.ndarray]:
        """The first derivatives, by canonical name. The scale of the query is inside the function."""
        return _named(*_vjp(*model, jnp.asarray(x), jnp.asarray(dy)))

    def r1(self, model: Model, x: np.ndarray, w: np.ndarray) -> tuple[float, Mapping[str, np.ndarray]]:
        """The gradient penalty and its derivatives."""
        value, gradients = _r1(*model, jnp.asarray(x), jnp.asarray(w))
        return float(value), _named(*gradients)


def _arrays(params: Mapping[str, np.ndarray]) -> Params:
    return {name: jnp.asarray(value) for name, value in params.items()}


def _named(by_params: Params, by_x: jax.Array) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in {"x": by_x, **by_params}.items()}
