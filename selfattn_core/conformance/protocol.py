"""The protocol of a conformance backend: its methods and its claims."""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard, runtime_checkable

from selfattn_core.arrays import Array
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.conformance.cases.case import Layout, Run
from selfattn_core.conformance.cases.computations import Ability

__all__ = [
    "ABILITIES",
    "DEFAULT_DTYPES",
    "DEVICE_METHODS",
    "METHODS",
    "Ability",
    "Backend",
    "Build",
    "Claims",
    "Layout",
    "Placed",
    "declined",
    "expected_failures_of",
    "takes_device",
]

Build = Callable[[SelfAttentionConfig, Mapping[str, Array], str, str], Any]


@runtime_checkable
class Backend(Protocol):
    """One implementation of the layer. The kit calls it with numpy arrays and canonical names.

    Every backend has `name`, `versions`, `claims`, `layouts` and `build`, and one method for each ability that it claims.
    `dtypes` and `expected_failures` are optional. The kit never calls the method of an unclaimed ability. The report lists
    the ability as unclaimed.

    Arrays are channels-last, (B, H, W, C), whatever layout the framework uses. The backend transposes them. A `model`
    is the object that `build` returns. The kit only passes it back. The kit passes 16-bit numbers as float32 arrays whose
    values the 16-bit format can represent. The backend casts the arrays that it receives, and may return float32.

    Four further methods are optional:

    - `declines(config)` returns the reason why the backend has no layer for a configuration, or "". The report lists the
      cases of such a configuration as unclaimed, with the reason.
    - `update(model, params)` returns a model with these weights. It may change the given model. With it, training keeps
      one model. Without it, training calls `build` for each step.
    - `eager(model)` returns a model that computes operation by operation. A backend needs it if `build` compiles.
    - `as_shipped(model)` returns a model with the framework's default precision. A backend needs it if `build` sets a
      higher one.

    A backend that computes over several processes or devices has a method `over(count)`. It returns a context in which
    the backend computes over that many, or over as many as it likes for None. At the end of the context they are ended.
    The arguments and the answers are those of the whole map, so the backend divides and joins them.

    A backend that can compute on a chosen device has the methods of `Placed`. It may also have `peak_memory(call)`, which
    returns the bytes by which the device's memory rises at its highest while the call runs. `peak_memory` raises
    `selfattn_core.conformance.PeakUnknownError` if it cannot measure that. Without the methods of `Placed` the
    backend chooses its device itself.
    """

    name: str

    def versions(self) -> Mapping[str, str]:
        """The versions of the libraries that the backend uses, for the report."""

    def claims(self) -> frozenset[str]:
        """The abilities of `ABILITIES` that this backend has."""

    def layouts(self) -> tuple[str, ...]:
        """The layouts that it computes in: "channels_last", "channels_first" or both."""

    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that it computes in, of "float32", "float64", "bfloat16" and "float16". By default the first two."""

    def expected_failures(self) -> Mapping[str, tuple[str, str]]:
        """Known failures: {"SA-FWD-001", or …"/float32", or …"/float32/channels_last": (reason, link)}.

        Only a wrong answer can be an expected failure. An exception, a crash or a timeout is always an error. If a listed
        run passes, the kit reports a failure. Remove it from the list then.
        """

    def build(self, config: SelfAttentionConfig, params: Mapping[str, Array], dtype: str, layout: str) -> Any:
        """A layer with these weights, computing in `dtype` and `layout`."""

    def forward(self, model: Any, x: Array) -> Array:
        """Y (B, H, W, C)."""

    def attention_map(self, model: Any, x: Array) -> Array:
        """A (B, N, M)."""

    def vjp(self, model: Any, x: Array, dy: Array) -> Mapping[str, Array]:
        """The gradient of sum(dy∘y): {"x": …, canonical name: …}."""

    def params(self, model: Any) -> Mapping[str, Array]:
        """The weights of the layer, by canonical name."""

    def initial(self, config: SelfAttentionConfig, seed: int) -> Mapping[str, Array]:
        """The float32 weights of a new layer, by canonical name. The framework draws them from this seed."""

    def training_pass(self, model: Any, x: Array) -> Mapping[str, Array]:
        """One forward pass in training mode: {"y": …}, and the weights and the state after it, by canonical name.

        The kit calls this for layers with spectral norm. The pass moves their state by one power iteration, and the model
        holds the new state afterwards. All other methods except `training_vjp` compute in evaluation mode.
        """

    def training_vjp(self, model: Any, x: Array, dy: Array) -> Mapping[str, Array]:
        """The gradient of sum(dy∘y) for one forward pass in training mode: {"x": …, canonical name: …}.

        The kit calls this for layers with spectral norm. The gradient treats u and v as constants, with their values after
        the power iteration.
        """

    def r1(self, model: Any, x: Array, w: Array) -> tuple[float, Mapping[str, Array]]:
        """‖d sum(w∘y)/dx‖² and its gradient {"x": …, canonical name: …}."""

    def vjp_of_vjp(
        self, model: Any, x: Array, dy: Array, cotangents: Mapping[str, Array]
    ) -> Mapping[str, Array]:
        """The gradient of Σ sum(cotangent∘vjp(…)[name]): {"dy": …, "x": …, canonical name: …}."""

    def compiled(self, model: Any) -> Any:
        """The model in compiled form. `forward` and `vjp` accept it in place of the model."""

    def saved(self, model: Any, folder: str) -> Any:
        """Save the model to a file of the framework's own in this empty folder, and return a new model from that file."""

    def per_sample_vjp(self, model: Any, x: Array, dy: Array) -> Mapping[str, Array]:
        """The gradient of sum(dy∘y) for each sample: {"x": (B, H, W, C), canonical name: (B, …)}."""

    def default_products(self, left: Array, right: Array) -> Mapping[str, Array]:
        """The product of two float32 matrices in the framework's default precision, by name of the operation.

        The names cover each operation that the layer uses, such as a matrix product and a 1×1 convolution. The kit measures
        the format to which they round their operands. It judges the family "shipped" in that format.
        """


class Placed(Protocol):
    """The further methods of a backend that can compute on a chosen device. A backend has all three or none."""

    def devices(self) -> Mapping[str, tuple[str, ...]]:
        """The names of the devices of each kind that this machine has, as in {"cpu": ("cpu:0",), "cuda": ()}."""

    def on(self, device: str) -> AbstractContextManager[Mapping[str, str]]:
        """A context in which everything is built and computed on one of `devices`. It yields "model" and "driver"."""

    def places(self) -> frozenset[str]:
        """The devices that held the answers given since the last call, before they became numpy arrays."""


METHODS: Mapping[Ability, str] = {
    "forward": "forward",
    "map": "attention_map",
    "vjp": "vjp",
    "params": "params",
    "init": "initial",
    "spectral_norm": "training_pass",
    "training_vjp": "training_vjp",
    "r1": "r1",
    "mixed": "vjp_of_vjp",
    "compiled": "compiled",
    "saved": "saved",
    "per_sample": "per_sample_vjp",
    "memory": "forward",
    "shipped": "default_products",
}
"""The method of each ability. "memory" claims that the memory of `forward`, and of all other methods, is linear."""

ABILITIES: tuple[Ability, ...] = tuple(METHODS)

DEVICE_METHODS = ("devices", "on", "places")
"""The methods of `Placed`."""

DEFAULT_DTYPES = ("float32", "float64")
"""The dtypes of a backend without the method `dtypes`."""


@dataclass(frozen=True)
class Claims:
    """What a backend claims. The kit tests exactly this.

    Args:
        abilities: some of `ABILITIES`.
        layouts: the layouts that it computes in.
        dtypes: the dtypes that it computes in.
    """

    abilities: Collection[str]
    layouts: Collection[str]
    dtypes: Collection[str]

    @classmethod
    def of(cls, backend: Backend) -> "Claims":
        """The claims of a backend."""
        dtypes = backend.dtypes() if hasattr(backend, "dtypes") else DEFAULT_DTYPES
        return cls(frozenset(backend.claims()), tuple(backend.layouts()), tuple(dtypes))

    def covers(self, run: Run) -> bool:
        """Whether the backend must answer a run."""
        has_layout = run.layout in self.layouts or run.in_any_layout
        return run.case.needs <= set(self.abilities) and has_layout and run.dtype in self.dtypes

    def layout(self, run: Run) -> str:
        """The layout for a covered run: the layout of the run if the backend has it, or else the first that it has."""
        return run.layout if run.layout in self.layouts else next(iter(self.layouts))


def declined(backend: Backend, config: SelfAttentionConfig) -> str:
    """The reason why a backend has no layer for a configuration. Empty if it gives none."""
    declines = getattr(backend, "declines", None)
    return "" if declines is None else str(declines(config))


def expected_failures_of(backend: Backend) -> dict[str, tuple[str, str]]:
    """The expected failures of a backend, each with reason and link. Empty if it announces none."""
    return dict(backend.expected_failures()) if hasattr(backend, "expected_failures") else {}


def takes_device(backend: Any) -> TypeGuard[Placed]:
    """Whether a backend can compute on a chosen device."""
    return all(callable(getattr(backend, name, None)) for name in DEVICE_METHODS)
