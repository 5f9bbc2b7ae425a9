"""The two Flax layers as backends of the conformance kit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from numpy.typing import NDArray

from selfattn_core import SelfAttentionConfig, parameter_table
from selfattn_flax import linen, weights

Array = NDArray[Any]


@dataclass(frozen=True)
class Model:
    """A layer as Flax's transforms see it.

    Args:
        config: which layer.
        params: the tree of its parameters.
        apply: (params, x) to y.
        attention: (params, x) to A.
        export: the weights as the adapter exports them.
    """

    config: SelfAttentionConfig
    params: Any
    apply: Callable[[Any, jax.Array], jax.Array]
    attention: Callable[[Any, jax.Array], jax.Array]
    export: Callable[[], dict[str, Array]]


class FlaxBackend:
    """One of Flax's two layers, as a pure function of a tree of parameters."""

    def __init__(
        self, name: str, build: Callable[[SelfAttentionConfig, Mapping[str, Array], str], Model]
    ) -> None:
        self.name = name
        self._build = build

    def versions(self) -> Mapping[str, str]:
        """The versions of flax, jax and jaxlib."""
        return {package: version(package) for package in ("flax", "jax", "jaxlib")}

    def claims(self) -> frozenset[str]:
        """Everything the kit asks for."""
        return frozenset({"forward", "map", "vjp", "r1", "params"})

    def layouts(self) -> tuple[str, ...]:
        """Flax has one."""
        return ("channels_last",)

    def build(
        self,
        config: SelfAttentionConfig,
        params: Mapping[str, Array],
        dtype: str,
        layout: str,  # noqa: ARG002 - the protocol's, and there is but one
    ) -> Model:
        """The layer; float64 needs a process in which JAX has it (JAX_ENABLE_X64=1)."""
        return self._build(config, params, dtype)

    def forward(self, model: Model, x: Array) -> Array:
        """The output y."""
        return np.array(model.apply(model.params, jnp.asarray(x)))

    def attention_map(self, model: Model, x: Array) -> Array:
        """The map A."""
        return np.array(model.attention(model.params, jnp.asarray(x)))

    def vjp(self, model: Model, x: Array, dy: Array) -> Mapping[str, Array]:
        """Gradients by reverse mode."""

        @jax.jit
        def gradients(params: Any, x: jax.Array, dy: jax.Array) -> tuple[Any, jax.Array]:
            _, pull = jax.vjp(model.apply, params, x)
            return pull(dy)

        return _gradients(model, *gradients(model.params, jnp.asarray(x), jnp.asarray(dy)))

    def r1(self, model: Model, x: Array, w: Array) -> tuple[float, Mapping[str, Array]]:
        """The penalty by reverse mode over reverse mode."""

        def penalty(params: Any, x: jax.Array) -> jax.Array:
            dx = jax.grad(lambda x: jnp.sum(jnp.asarray(w) * model.apply(params, x)))(x)
            return jnp.sum(dx**2)

        derivative = jax.jit(jax.value_and_grad(penalty, (0, 1)))
        value, gradients = derivative(model.params, jnp.asarray(x))
        return float(value), _gradients(model, *gradients)

    def params(self, model: Model) -> Mapping[str, Array]:
        """The weights as the adapter exports them."""
        return model.export()


def _nnx(config: SelfAttentionConfig, params: Mapping[str, Array], dtype: str) -> Model:
    layer = weights.from_canonical(config, params, param_dtype=dtype)
    # The specification is the function in evaluation.
    layer.eval()
    graph, state = nnx.split(layer)

    def attention(state: Any, x: jax.Array) -> jax.Array:
        _, sown = nnx.capture(nnx.merge(graph, state), nnx.Intermediate)(x, sow_weights=True)
        return sown["attention_weights"][0]

    return Model(
        config,
        state,
        lambda state, x: nnx.merge(graph, state)(x),
        attention,
        lambda: weights.to_canonical(layer),
    )


def _linen(config: SelfAttentionConfig, params: Mapping[str, Array], dtype: str) -> Model:
    module, variables = linen.from_canonical(config, params, param_dtype=dtype)

    def attention(params: Any, x: jax.Array) -> jax.Array:
        _, sown = module.apply(
            variables | {"params": params},
            x,
            sow_weights=True,
            use_running_average=True,
            mutable=["intermediates"],
        )
        return sown["intermediates"]["attention_weights"][0]

    return Model(
        config,
        variables["params"],
        lambda params, x: module.apply(variables | {"params": params}, x, use_running_average=True),
        attention,
        lambda: linen.to_canonical(module, variables),
    )


nnx_backend = FlaxBackend("flax-nnx", _nnx)
linen_backend = FlaxBackend("flax-linen", _linen)


def _gradients(model: Model, by_params: Any, by_x: jax.Array) -> dict[str, Array]:
    tree = nnx.to_pure_dict(by_params) if isinstance(by_params, nnx.State) else by_params
    flat = traverse_util.flatten_dict(tree, sep=".")
    return {"x": np.array(by_x)} | {
        name: weights.to_numpy(flat[name]) for name in parameter_table(model.config)
    }
