"""What a backend of the conformance kit is, and the six that ship with this library."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from numpy.typing import NDArray

from selfattn_core.config import SelfAttentionConfig

__all__ = ["REGISTRY", "Ability", "Backend", "Layout", "Registered", "resolve"]

Array = NDArray[Any]
Ability = Literal["forward", "map", "vjp", "r1", "params"]
Layout = Literal["channels_last", "channels_first"]


@runtime_checkable
class Backend(Protocol):
    """One implementation of the layer, spoken to in numpy arrays and canonical names.

    Arrays are channels-last, (B, H, W, C), whatever the framework's own layout is: the backend transposes. A `model`
    is whatever `build` returns; the kit only hands it back. Abilities that are not claimed are never called, and the
    report lists them as unclaimed.
    """

    name: str

    def versions(self) -> Mapping[str, str]:
        """Versions of the libraries underneath, for the report."""

    def claims(self) -> frozenset[str]:
        """Which of the abilities "forward", "map", "vjp", "r1" and "params" this backend has."""

    def layouts(self) -> tuple[str, ...]:
        """Which of "channels_last" and "channels_first" it computes in."""

    def build(self, config: SelfAttentionConfig, params: Mapping[str, Array], dtype: str, layout: str) -> Any:
        """A layer with these weights, computing in `dtype` ("float32" or "float64") and `layout`."""

    def forward(self, model: Any, x: Array) -> Array:
        """Y (B, H, W, C)."""

    def attention_map(self, model: Any, x: Array) -> Array:
        """A (B, N, M)."""

    def vjp(self, model: Any, x: Array, dy: Array) -> Mapping[str, Array]:
        """The gradient of sum(dy∘y): {"x": …, canonical name: …}."""

    def r1(self, model: Any, x: Array, w: Array) -> tuple[float, Mapping[str, Array]]:
        """‖d sum(w∘y)/dx‖² and its gradient {"x": …, canonical name: …}."""

    def params(self, model: Any) -> Mapping[str, Array]:
        """The layer's weights by canonical name."""


@dataclass(frozen=True)
class Registered:
    """Where a backend is found and what its process needs.

    Args:
        target: "module:object".
        requires: import names without which it cannot run.
        extra: the extra of this library that installs them.
        environment: variables to set before anything is imported.
    """

    target: str
    requires: tuple[str, ...]
    extra: str
    environment: Mapping[str, str] = field(default_factory=dict)


def _keras(backend: str, module: str, extra: str) -> Registered:
    return Registered(
        "selfattn_keras.conformance:backend", ("keras", module), extra, {"KERAS_BACKEND": backend}
    )


REGISTRY: Mapping[str, Registered] = {
    "torch": Registered("selfattn_torch.conformance:backend", ("torch",), "torch"),
    "keras-tensorflow": _keras("tensorflow", "tensorflow", "keras"),
    "keras-jax": _keras("jax", "jax", "keras,jax"),
    "keras-torch": _keras("torch", "torch", "keras,torch"),
    "flax-nnx": Registered("selfattn_flax.conformance:nnx_backend", ("flax", "jax"), "flax"),
    "flax-linen": Registered("selfattn_flax.conformance:linen_backend", ("flax", "jax"), "flax"),
}


def resolve(target: str) -> Backend:
    """Import a backend.

    Args:
        target: "module:object"; the object is a backend, or a class or function that makes one.

    Raises:
        ValueError: if the target is not spelled so, or the object lacks parts of the protocol; names them.
        ModuleNotFoundError: if the module is not there.

    Example:
        >>> resolve("torch")
        Traceback (most recent call last):
        ...
        ValueError: backend 'torch': expected module:object, for example my_package.conformance:backend.
    """
    module_name, colon, attribute = target.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(
            f"backend {target!r}: expected module:object, for example my_package.conformance:backend."
        )
    found = importlib.import_module(module_name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"backend {target!r}: {module_name} has no {attribute!r}.")
        found = getattr(found, part)
    candidate: Any = found
    if callable(candidate) and (isinstance(candidate, type) or not hasattr(candidate, "build")):
        candidate = candidate()
    missing = [name for name in _ALWAYS if not hasattr(candidate, name)]
    missing += [
        _METHOD[claim] for claim in _claims(candidate) if not hasattr(candidate, _METHOD.get(claim, claim))
    ]
    if missing:
        raise ValueError(
            f"backend {target!r}: lacks {', '.join(missing)}; the protocol is selfattn_core.conformance.Backend."
        )
    backend: Backend = candidate
    return backend


_ALWAYS = ("name", "versions", "claims", "layouts", "build")
_METHOD = {"forward": "forward", "map": "attention_map", "vjp": "vjp", "r1": "r1", "params": "params"}


def _claims(candidate: Any) -> list[str]:
    claims = sorted(candidate.claims()) if hasattr(candidate, "claims") else []
    if unknown := [claim for claim in claims if claim not in _METHOD]:
        raise ValueError(f"backend claims {', '.join(unknown)}; the abilities are {', '.join(_METHOD)}.")
    return claims
