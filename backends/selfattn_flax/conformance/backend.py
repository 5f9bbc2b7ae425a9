"""The two Flax layers as backends of the conformance kit."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import serialization

from selfattn_core import SelfAttentionConfig, parameter_table
from selfattn_core.arrays import Array
from selfattn_core.conformance.cases.case import DTYPES
from selfattn_core.conformance.protocol import ABILITIES
from selfattn_core.params import state_table
from selfattn_flax.conformance import functions
from selfattn_flax.conformance.linen import LINEN
from selfattn_flax.conformance.model import Kind, Model, filled, in_leaf_order, like, to_array
from selfattn_flax.conformance.nnx import NNX
from selfattn_ops.devices.jax import OnDevices


class FlaxBackend(OnDevices):
    """One of Flax's two layers."""

    def __init__(self, name: str, kind: Kind) -> None:
        super().__init__()
        self.name = name
        self.kind = kind

    def versions(self) -> Mapping[str, str]:
        """The versions of flax, jax and jaxlib."""
        return {package: version(package) for package in ("flax", "jax", "jaxlib")}

    def claims(self) -> frozenset[str]:
        """Everything the kit asks for."""
        return frozenset(ABILITIES)

    def layouts(self) -> tuple[str, ...]:
        """The single layout of Flax, channels last."""
        return ("channels_last",)

    def dtypes(self) -> tuple[str, ...]:
        """All dtypes of the kit."""
        return DTYPES

    def build(
        self,
        config: SelfAttentionConfig,
        params: Mapping[str, Array],
        dtype: str,
        layout: str,  # noqa: ARG002 - the protocol's, and there is but one
    ) -> Model:
        """The layer. float64 needs a process with JAX_ENABLE_X64=1."""
        return Model(config, dtype, *self.kind.build(config, params, dtype, "highest"))

    def update(self, model: Model, params: Mapping[str, Array]) -> Model:
        """The same static part with other arrays."""
        state = filled(model.state, state_table(model.config), params, model.dtype)
        return replace(model, tree=like(model, params), state=state)

    def forward(self, model: Model, x: Array) -> Array:
        """The output y."""
        apply = functions.compiled_apply if model.compiled else functions.apply
        y, model.state = apply(self.kind, model.static, model.tree, model.state, model.given(x))
        return to_array(self.noted(y))

    def attention_map(self, model: Model, x: Array) -> Array:
        """The map A."""
        attention = functions.compiled_attention_map if model.compiled else functions.attention_map
        answer = attention(self.kind, model.static, model.tree, model.state, model.given(x))
        return to_array(self.noted(answer))

    def vjp(self, model: Model, x: Array, dy: Array) -> Mapping[str, Array]:
        """Gradients by reverse mode."""
        gradients = functions.compiled_vjp if model.compiled else functions.vjp
        named, model.state = gradients(
            self.kind, model.static, model.tree, model.state, model.given(x), model.given(dy)
        )
        return self._named(model, *named)

    def params(self, model: Model) -> Mapping[str, Array]:
        """The weights as the adapter exports them."""
        for leaf in jax.tree.leaves(model.tree):
            self.noted(leaf)
        return self.kind.export(model.static, model.tree, model.state)

    def initial(self, config: SelfAttentionConfig, seed: int) -> Mapping[str, Array]:
        """A new layer."""
        static, tree, state = self.kind.new(config, seed)
        for leaf in jax.tree.leaves(tree):
            self.noted(leaf)
        return self.kind.export(static, tree, state)

    def training_pass(self, model: Model, x: Array) -> Mapping[str, Array]:
        """The output in training mode, and the weights with the state after it, which the model keeps."""
        y, model.state = functions.training_pass(
            self.kind, model.static, model.tree, model.state, model.given(x)
        )
        return {"y": to_array(self.noted(y)), **self.kind.export(model.static, model.tree, model.state)}

    def training_vjp(self, model: Model, x: Array, dy: Array) -> Mapping[str, Array]:
        """Gradients by reverse mode, in training."""
        gradients = functions.training_vjp(
            self.kind, model.static, model.tree, model.state, model.given(x), model.given(dy)
        )
        return self._named(model, *gradients)

    def r1(self, model: Model, x: Array, w: Array) -> tuple[float, Mapping[str, Array]]:
        """The penalty by reverse mode over reverse mode."""
        value, gradients = functions.r1(
            self.kind, model.static, model.tree, model.state, model.given(x), model.given(w)
        )
        return float(value), self._named(model, *gradients)

    def vjp_of_vjp(
        self, model: Model, x: Array, dy: Array, cotangents: Mapping[str, Array]
    ) -> Mapping[str, Array]:
        """Second derivatives by reverse mode over reverse mode."""
        given = (jax.tree.leaves(like(model, cotangents)), model.given(cotangents["x"]))
        leaves, by_x, by_dy = functions.vjp_of_vjp(
            self.kind, model.static, model.tree, model.state, model.given(x), model.given(dy), given
        )
        return {"dy": to_array(self.noted(by_dy))} | self._named(model, leaves, by_x)

    def compiled(self, model: Model) -> Model:
        """The model itself, because this backend compiles all its models with `jax.jit`."""
        return model

    def eager(self, model: Model) -> Model:
        """Operation by operation."""
        return replace(model, compiled=False)

    def as_shipped(self, model: Model) -> Model:
        """The layer without its own precision, so that JAX's default applies."""
        params = self.kind.export(model.static, model.tree, model.state)
        static, tree, state = self.kind.build(model.config, params, str(model.dtype), None)
        return replace(model, static=static, tree=tree, state=state)

    def saved(self, model: Model, folder: str) -> Model:
        """The layer after Flax's own serialization of its trees."""
        path = Path(folder) / "layer.msgpack"
        trees = (model.tree, model.state)
        leaves = dict(enumerate(jax.tree.leaves(jax.device_get(trees))))
        path.write_bytes(serialization.to_bytes(leaves))
        found = serialization.from_bytes(leaves, path.read_bytes())
        loaded = [jnp.asarray(found[index]) for index in sorted(found)]
        tree, state = jax.tree.unflatten(jax.tree.structure(trees), loaded)
        return replace(model, tree=tree, state=state)

    def per_sample_vjp(self, model: Model, x: Array, dy: Array) -> Mapping[str, Array]:
        """Gradients per sample, by `jax.vmap` over the gradient."""
        gradients = functions.per_sample_vjp(
            self.kind, model.static, model.tree, model.state, model.given(x), model.given(dy)
        )
        return self._named(model, *gradients)

    def _named(self, model: Model, leaves: list[jax.Array], by_x: jax.Array) -> dict[str, Array]:
        arrays = {
            name: to_array(self.noted(leaf))
            for name, leaf in zip(in_leaf_order(parameter_table(model.config)), leaves, strict=True)
        }
        named = {"x": to_array(self.noted(by_x))}
        for name in parameter_table(model.config):
            named[name] = arrays[name][..., 0, 0, :, :] if name.endswith("kernel") else arrays[name]
        return named


nnx_backend = FlaxBackend("flax-nnx", NNX)
linen_backend = FlaxBackend("flax-linen", LINEN)
