"""The two Flax layers as backends of the conformance kit."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx, serialization
from jax.typing import DTypeLike
from numpy.typing import NDArray

from selfattn_core import SelfAttentionConfig, parameter_table
from selfattn_core.conformance.cases.table import DTYPES
from selfattn_core.conformance.protocol import ABILITIES
from selfattn_core.params import state_table, widen
from selfattn_flax import linen
from selfattn_flax.nnx import SelfAttention2D, from_canonical, to_canonical
from selfattn_ops.devices.jax import OnDevices

Array = NDArray[Any]


@dataclass(frozen=True)
class Kind:
    """One of Flax's two layers, as pure functions of a tree of parameters.

    Args:
        build: (config, canonical arrays, dtype, precision) to (what is static, parameters, state).
        new: (config, seed) to the same, of a new layer.
        apply: (static, parameters, state, x) to y and the state after it, in evaluation.
        attention: (static, parameters, state, x) to A.
        train: (static, parameters, state, x) to y and the state after it, in training.
        export: (static, parameters, state) to canonical arrays.
    """

    build: Callable[[SelfAttentionConfig, Mapping[str, Array], str, str | None], tuple[Any, Any, Any]]
    new: Callable[[SelfAttentionConfig, int], tuple[Any, Any, Any]]
    apply: Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, Any]]
    attention: Callable[[Any, Any, Any, jax.Array], jax.Array]
    train: Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, Any]]
    export: Callable[[Any, Any, Any], dict[str, Array]]


@dataclass
class Model:
    """A layer.

    Args:
        config: which layer.
        dtype: of its parameters.
        static: what is not an array.
        tree: its parameters.
        state: what else it holds; a pass that moves what it should leave alone moves this.
        compiled: whether `forward`, `attention_map` and `vjp` are compiled; everything else always is.
    """

    config: SelfAttentionConfig
    dtype: DTypeLike
    static: Any
    tree: Any
    state: Any
    compiled: bool = True

    def given(self, x: Array) -> jax.Array:
        """(B, H, W, C) as the layer takes it."""
        return jnp.asarray(x, self.dtype)


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
        """Flax has one."""
        return ("channels_last",)

    def dtypes(self) -> tuple[str, ...]:
        """All that the kit knows."""
        return DTYPES

    def build(
        self,
        config: SelfAttentionConfig,
        params: Mapping[str, Array],
        dtype: str,
        layout: str,  # noqa: ARG002 - the protocol's, and there is but one
    ) -> Model:
        """The layer; float64 needs a process in which JAX has it (JAX_ENABLE_X64=1)."""
        return Model(config, dtype, *self.kind.build(config, params, dtype, "highest"))

    def update(self, model: Model, params: Mapping[str, Array]) -> Model:
        """The same static part over other arrays."""
        state = _filled(model.state, state_table(model.config), params, model.dtype)
        return replace(model, tree=_like(model, params), state=state)

    def forward(self, model: Model, x: Array) -> Array:
        """The output y."""
        apply = _forward if model.compiled else _apply
        y, model.state = apply(self.kind, model.static, model.tree, model.state, model.given(x))
        return _array(self.noted(y))

    def attention_map(self, model: Model, x: Array) -> Array:
        """The map A."""
        attention = _attention if model.compiled else _map
        answer = attention(self.kind, model.static, model.tree, model.state, model.given(x))
        return _array(self.noted(answer))

    def vjp(self, model: Model, x: Array, dy: Array) -> Mapping[str, Array]:
        """Gradients by reverse mode."""
        gradients = _vjp if model.compiled else _first_with_state
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
        """The output in training, and the weights with the state after it."""
        y, state = _training_pass(self.kind, model.static, model.tree, model.state, model.given(x))
        return {"y": _array(self.noted(y)), **self.kind.export(model.static, model.tree, state)}

    def training_vjp(self, model: Model, x: Array, dy: Array) -> Mapping[str, Array]:
        """Gradients by reverse mode, in training."""
        gradients = _training_vjp(
            self.kind, model.static, model.tree, model.state, model.given(x), model.given(dy)
        )
        return self._named(model, *gradients)

    def r1(self, model: Model, x: Array, w: Array) -> tuple[float, Mapping[str, Array]]:
        """The penalty by reverse mode over reverse mode."""
        value, gradients = _r1(
            self.kind, model.static, model.tree, model.state, model.given(x), model.given(w)
        )
        return float(value), self._named(model, *gradients)

    def vjp_of_vjp(
        self, model: Model, x: Array, dy: Array, cotangents: Mapping[str, Array]
    ) -> Mapping[str, Array]:
        """Second derivatives by reverse mode over reverse mode."""
        given = (jax.tree.leaves(_like(model, cotangents)), model.given(cotangents["x"]))
        leaves, by_x, by_dy = _second(
            self.kind, model.static, model.tree, model.state, model.given(x), model.given(dy), given
        )
        return {"dy": _array(self.noted(by_dy))} | self._named(model, leaves, by_x)

    def compiled(self, model: Model) -> Model:
        """By `jax.jit`, as all models of this backend are."""
        return model

    def eager(self, model: Model) -> Model:
        """Operation by operation."""
        return replace(model, compiled=False)

    def as_shipped(self, model: Model) -> Model:
        """With no precision of its own, so that JAX's default counts."""
        params = self.kind.export(model.static, model.tree, model.state)
        static, tree, state = self.kind.build(model.config, params, str(model.dtype), None)
        return replace(model, static=static, tree=tree, state=state)

    def saved(self, model: Model, folder: str) -> Model:
        """By Flax's own serialization of the trees."""
        path = Path(folder) / "layer.msgpack"
        trees = (model.tree, model.state)
        leaves = dict(enumerate(jax.tree.leaves(jax.device_get(trees))))
        path.write_bytes(serialization.to_bytes(leaves))
        found = serialization.from_bytes(leaves, path.read_bytes())
        loaded = [jnp.asarray(found[index]) for index in sorted(found)]
        tree, state = jax.tree.unflatten(jax.tree.structure(trees), loaded)
        return replace(model, tree=tree, state=state)

    def per_sample_vjp(self, model: Model, x: Array, dy: Array) -> Mapping[str, Array]:
        """`jax.vmap` over the gradient."""
        gradients = _per_sample(
            self.kind, model.static, model.tree, model.state, model.given(x), model.given(dy)
        )
        return self._named(model, *gradients)

    def _named(self, model: Model, leaves: list[jax.Array], by_x: jax.Array) -> dict[str, Array]:
        arrays = {
            name: _array(self.noted(leaf))
            for name, leaf in zip(_in_leaf_order(parameter_table(model.config)), leaves, strict=True)
        }
        named = {"x": _array(self.noted(by_x))}
        for name in parameter_table(model.config):
            named[name] = arrays[name][..., 0, 0, :, :] if name.endswith("kernel") else arrays[name]
        return named


# Layers of one config are static in the same way, so that each function is compiled once for each size. Gradients by
# parameters leave as leaves, whose names are no part of the program: those of the two layers are then the same.
_static = partial(jax.jit, static_argnums=(0, 1))


def _apply(kind: Kind, static: Any, tree: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    return kind.apply(static, tree, state, x)


_forward = _static(_apply)


def _map(kind: Kind, static: Any, tree: Any, state: Any, x: jax.Array) -> jax.Array:
    return kind.attention(static, tree, state, x)


_attention = _static(_map)


def _first_with_state(
    kind: Kind, static: Any, tree: Any, state: Any, x: jax.Array, dy: jax.Array
) -> tuple[tuple[list[jax.Array], jax.Array], Any]:
    _, pull, state = jax.vjp(lambda tree, x: kind.apply(static, tree, state, x), tree, x, has_aux=True)
    by_tree, by_x = pull(dy)
    return (jax.tree.leaves(by_tree), by_x), state


_vjp = _static(_first_with_state)


def _first(
    kind: Kind, static: Any, tree: Any, state: Any, x: jax.Array, dy: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    return _first_with_state(kind, static, tree, state, x, dy)[0]


@_static
def _training_pass(kind: Kind, static: Any, tree: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    return kind.train(static, tree, state, x)


@_static
def _training_vjp(
    kind: Kind, static: Any, tree: Any, state: Any, x: jax.Array, dy: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    _, pull, _ = jax.vjp(lambda tree, x: kind.train(static, tree, state, x), tree, x, has_aux=True)
    by_tree, by_x = pull(dy)
    return jax.tree.leaves(by_tree), by_x


@_static
def _r1(kind: Kind, static: Any, tree: Any, state: Any, x: jax.Array, w: jax.Array) -> Any:
    def penalty(tree: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.grad(lambda x: jnp.sum(w * kind.apply(static, tree, state, x)[0]))(x) ** 2)

    value, (by_tree, by_x) = jax.value_and_grad(penalty, (0, 1))(tree, x)
    return value, (jax.tree.leaves(by_tree), by_x)


@_static
def _second(
    kind: Kind, static: Any, tree: Any, state: Any, x: jax.Array, dy: jax.Array, cotangents: Any
) -> Any:
    _, pull = jax.vjp(lambda tree, x, dy: _first(kind, static, tree, state, x, dy), tree, x, dy)
    by_tree, by_x, by_dy = pull(cotangents)
    return jax.tree.leaves(by_tree), by_x, by_dy


@_static
def _per_sample(
    kind: Kind, static: Any, tree: Any, state: Any, x: jax.Array, dy: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    return jax.vmap(partial(_first, kind, static), (None, None, 0, 0))(tree, state, x, dy)


def _nnx_build(
    config: SelfAttentionConfig, params: Mapping[str, Array], dtype: str, precision: str | None
) -> tuple[Any, Any, Any]:
    return _nnx_split(from_canonical(config, params, param_dtype=dtype, precision=precision))


def _nnx_new(config: SelfAttentionConfig, seed: int) -> tuple[Any, Any, Any]:
    return _nnx_split(SelfAttention2D.from_config(config, rngs=nnx.Rngs(seed)))


def _nnx_split(layer: SelfAttention2D) -> tuple[Any, Any, Any]:
    # The specification is the function in evaluation.
    layer.eval()
    return nnx.split(layer, nnx.Param, ...)


def _nnx_apply(static: Any, tree: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    # A variable may be moved only where it was made, which inside a derivative is there.
    layer = nnx.merge(static, tree, state, copy=True)
    y = layer(x)
    return y, nnx.split(layer, nnx.Param, ...)[2]


def _nnx_attention(static: Any, tree: Any, state: Any, x: jax.Array) -> jax.Array:
    _, sown = nnx.capture(nnx.merge(static, tree, state), nnx.Intermediate)(x, sow_weights=True)
    return sown["attention_weights"][0]


def _nnx_train(static: Any, tree: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    layer = nnx.merge(static, tree, state, copy=True)
    layer.train()
    y = layer(x)
    return y, _nnx_split(layer)[2]


def _nnx_export(static: Any, tree: Any, state: Any) -> dict[str, Array]:
    return to_canonical(nnx.merge(static, tree, state))


def _linen_build(
    config: SelfAttentionConfig, params: Mapping[str, Array], dtype: str, precision: str | None
) -> tuple[Any, Any, Any]:
    return _linen_split(*linen.from_canonical(config, params, param_dtype=dtype, precision=precision))


def _linen_new(config: SelfAttentionConfig, seed: int) -> tuple[Any, Any, Any]:
    module = linen.SelfAttention2D.from_config(config)
    x = jnp.zeros((config.kv_pool, config.kv_pool, config.channels))
    return _linen_split(module, module.init(jax.random.key(seed), x, use_running_average=True))


def _linen_split(module: nn.Module, variables: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    state = {name: collection for name, collection in variables.items() if name != "params"}
    return module, variables["params"], state


def _linen_apply(static: nn.Module, tree: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    # What Linen is not asked to let move cannot.
    return static.apply({"params": tree, **state}, x, use_running_average=True), state


def _linen_attention(static: nn.Module, tree: Any, state: Any, x: jax.Array) -> jax.Array:
    _, sown = static.apply(
        {"params": tree, **state}, x, sow_weights=True, use_running_average=True, mutable=["intermediates"]
    )
    return sown["intermediates"]["attention_weights"][0]


def _linen_train(static: nn.Module, tree: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    variables = {"params": tree, **state}
    y, moved = static.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    return y, moved


def _linen_export(static: nn.Module, tree: Any, state: Any) -> dict[str, Array]:
    return linen.to_canonical(static, {"params": tree, **state})


nnx_backend = FlaxBackend(
    "flax-nnx", Kind(_nnx_build, _nnx_new, _nnx_apply, _nnx_attention, _nnx_train, _nnx_export)
)
linen_backend = FlaxBackend(
    "flax-linen", Kind(_linen_build, _linen_new, _linen_apply, _linen_attention, _linen_train, _linen_export)
)


def _array(array: jax.Array) -> Array:
    """A new array; bfloat16 is widened."""
    return np.array(widen(np.asarray(array)))


def _in_leaf_order(names: Iterable[str]) -> list[str]:
    """Canonical names in the order of the leaves of a tree."""
    return sorted(names, key=lambda name: name.split("."))


def _filled(tree: Any, names: Iterable[str], arrays: Mapping[str, Array], dtype: DTypeLike) -> Any:
    """The tree with these arrays, of canonical names and shapes, for its leaves."""
    leaves = [
        jnp.asarray(arrays[name][None, None] if name.endswith("kernel") else arrays[name], dtype)
        for name in _in_leaf_order(names)
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _like(model: Model, arrays: Mapping[str, Array]) -> Any:
    """Arrays of canonical names and shapes as a tree like the model's."""
    return _filled(model.tree, parameter_table(model.config), arrays, model.dtype)
