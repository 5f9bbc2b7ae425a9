"""What a backend of the conformance kit is: its methods, and what it claims."""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard, runtime_checkable

from numpy.typing import NDArray

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

Array = NDArray[Any]
Build = Callable[[SelfAttentionConfig, Mapping[str, Array], str, str], Any]


@runtime_checkable
class Backend(Protocol):
    """One implementation of the layer, spoken to in numpy arrays and canonical names.

    `name`, `versions`, `claims`, `layouts` and `build` are asked of every backend; of the rest, a backend has the
    methods of the abilities that it claims, and of `dtypes` and `expected_failures` those that it wants. Abilities that
    are not claimed are never called, and the report lists them as unclaimed.

    Arrays are channels-last, (B, H, W, C), whatever the framework's own layout is: the backend transposes. A `model`
    is whatever `build` returns; the kit only hands it back. A 16-bit dtype travels as float32 arrays whose values the
    format holds: the backend casts on the way in, and may widen on the way out.

    Three further methods are optional. `declines(config)` says why there is no layer for a config, or "": its cases are
    then listed as unclaimed, with that reason. `update(model, params)` gives a model with these weights, which may be the
    given one, changed: a training trajectory then keeps one model, where it otherwise calls `build` for each step. `eager(model)`
    gives the model computing operation by operation, for a backend of which `build` gives a compiled one. `as_shipped(model)`
    gives it with the precision that the framework has by default, where `build` asks for more.

    A backend that can be asked for a device has the methods of `Placed`, and may have `peak_memory(call)`: the bytes by which the memory of the device rises, at its highest, while the call runs
    (`conformance.questions.peak_memory.PeakUnknownError` where that is not known). Without them it is asked for no device, and
    says itself where it computes.
    """

    name: str

    def versions(self) -> Mapping[str, str]:
        """Versions of the libraries underneath, for the report."""

    def claims(self) -> frozenset[str]:
        """Which of the abilities of `ABILITIES` this backend has."""

    def layouts(self) -> tuple[str, ...]:
        """Which of "channels_last" and "channels_first" it computes in."""

    def dtypes(self) -> tuple[str, ...]:
        """Which of "float32", "float64", "bfloat16" and "float16" it computes in; without this method the first two."""

    def expected_failures(self) -> Mapping[str, tuple[str, str]]:
        """Known failures: {"SA-FWD-001", or …"/float32", or …"/float32/channels_last": (reason, link)}.

        They are wrong answers: an exception, a crash or a timeout is not expected. One that passes is reported as a
        failure: it is to be taken out.
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
        """The layer's weights by canonical name."""

    def initial(self, config: SelfAttentionConfig, seed: int) -> Mapping[str, Array]:
        """The float32 weights of a new layer, by canonical name, drawn by the framework from this seed."""

    def training_pass(self, model: Any, x: Array) -> Mapping[str, Array]:
        """One forward pass in training mode: {"y": …}, and weights and state after it by canonical name.

        It is asked of layers with spectral norm, which it moves by one power iteration; their other answers are those of
        the evaluation mode.
        """

    def training_vjp(self, model: Any, x: Array, dy: Array) -> Mapping[str, Array]:
        """The gradient of sum(dy∘y) of one forward pass in training mode: {"x": …, canonical name: …}.

        As `training_pass` is, it is asked of layers with spectral norm: u and v are those after the power iteration, and
        constant.
        """

    def r1(self, model: Any, x: Array, w: Array) -> tuple[float, Mapping[str, Array]]:
        """‖d sum(w∘y)/dx‖² and its gradient {"x": …, canonical name: …}."""

    def vjp_of_vjp(
        self, model: Any, x: Array, dy: Array, cotangents: Mapping[str, Array]
    ) -> Mapping[str, Array]:
        """The gradient of Σ sum(cotangent∘vjp(…)[name]): {"dy": …, "x": …, canonical name: …}."""

    def compiled(self, model: Any) -> Any:
        """The model in compiled form; `forward` and `vjp` take it in place of the model."""

    def saved(self, model: Any, folder: str) -> Any:
        """A new model, from a file of the framework's own that the model was saved to, in this empty folder."""

    def per_sample_vjp(self, model: Any, x: Array, dy: Array) -> Mapping[str, Array]:
        """The gradient of sum(dy∘y) of each sample: {"x": (B, H, W, C), canonical name: (B, …)}."""

    def default_products(self, left: Array, right: Array) -> Mapping[str, Array]:
        """The product of two float32 matrices as the framework has it by default, by name of the way it is computed.

        Each way that the layer takes is one: as a matrix product, as a 1×1 convolution. What they keep of their operands
        is the format that the family "shipped" is held to.
        """


class Placed(Protocol):
    """The further methods of a backend that can be asked for a device; it has all three or none."""

    def devices(self) -> Mapping[str, tuple[str, ...]]:
        """By each word for a kind of device, the names of those that there are, as in {"cpu": ("cpu:0",), "cuda": ()}."""

    def on(self, device: str) -> AbstractContextManager[Mapping[str, str]]:
        """A context in which all is built and computed on this one of `devices`; it gives "model" and "driver"."""

    def places(self) -> frozenset[str]:
        """On which devices the answers lay that were given since this was last called, before they were numpy's."""


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
"""The method of each ability; "memory" claims no more than that `forward`, and what else there is, stays linear."""

ABILITIES: tuple[Ability, ...] = tuple(METHODS)

DEVICE_METHODS = ("devices", "on", "places")
"""Those of `Placed`."""

DEFAULT_DTYPES = ("float32", "float64")
"""Of a backend without the method `dtypes`."""


@dataclass(frozen=True)
class Claims:
    """What a backend claims, and so what it is asked.

    Args:
        abilities: some of `ABILITIES`.
        layouts: that it computes in.
        dtypes: that it computes in.
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
        """Whether the backend has to answer a run."""
        has_layout = run.layout in self.layouts or run.in_any_layout
        return run.case.needs <= set(self.abilities) and has_layout and run.dtype in self.dtypes

    def layout(self, run: Run) -> str:
        """The layout to compute a covered run in: its own if the backend has it, or else one that it has."""
        return run.layout if run.layout in self.layouts else next(iter(self.layouts))


def declined(backend: Backend, config: SelfAttentionConfig) -> str:
    """Why a backend has no layer for a config; nothing if it has, or does not say."""
    declines = getattr(backend, "declines", None)
    return "" if declines is None else str(declines(config))


def expected_failures_of(backend: Backend) -> dict[str, tuple[str, str]]:
    """What a backend expects to fail, with reason and link; nothing if it does not say."""
    return dict(backend.expected_failures()) if hasattr(backend, "expected_failures") else {}


def takes_device(backend: Any) -> TypeGuard[Placed]:
    """Whether a backend can be asked for a device."""
    return all(callable(getattr(backend, name, None)) for name in DEVICE_METHODS)
