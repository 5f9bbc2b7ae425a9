"""What a backend of the conformance kit is, and the six that ship with this library."""

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeGuard, get_args, runtime_checkable

from numpy.typing import NDArray

from selfattn_core.config import SelfAttentionConfig
from selfattn_core.conformance.cases.run import Run, all_runs, chosen_layout, is_claimed
from selfattn_core.conformance.cases.table import CASES, DTYPES, Ability

__all__ = [
    "ABILITIES",
    "METHODS",
    "REGISTRY",
    "Ability",
    "Backend",
    "Layout",
    "NotABackendError",
    "Placed",
    "Registered",
    "declined",
    "dtypes_of",
    "expected_failures_of",
    "is_target",
    "resolve",
    "takes_device",
]

Array = NDArray[Any]
Layout = Literal["channels_last", "channels_first"]


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
    (`conformance.memory.PeakUnknownError` where that is not known). Without them it is asked for no device, and
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


_DTYPES = ("float32", "float64")


@dataclass(frozen=True)
class Registered:
    """Where a backend is found and what its process needs.

    Args:
        target: "module:object".
        requires: import names without which it cannot run.
        extra: the extra of this library that installs them.
        environment: variables to set before anything is imported.
        precision: and those that, beside them, ask float32 for its precision or show that the layer asks for it itself;
            not set where the framework's own defaults are asked for.
    """

    target: str
    requires: tuple[str, ...]
    extra: str
    environment: Mapping[str, str] = field(default_factory=dict)
    precision: Mapping[str, str] = field(default_factory=dict)

    @property
    def framework(self) -> str:
        """The framework of its arrays."""
        return self.requires[-1]

    @property
    def in_full(self) -> dict[str, str]:
        """The variables of a process that checks float32 at full precision."""
        return {**self.environment, **self.precision}


def _keras(framework: str) -> Registered:
    return Registered(
        "selfattn_keras.conformance.backend:backend",
        ("keras", framework),
        f"keras-{framework}",
        {"KERAS_BACKEND": framework},
    )


def _flax(kind: str) -> Registered:
    # These ask for their precision. Attention has to be in full under this default too, which on a processor rounds
    # operands in float64 alone.
    default = {"JAX_DEFAULT_MATMUL_PRECISION": "BF16_BF16_F32"}
    return Registered(
        f"selfattn_flax.conformance.backend:{kind}_backend", ("flax", "jax"), "flax", precision=default
    )


REGISTRY: Mapping[str, Registered] = {
    "torch": Registered("selfattn_torch.conformance.backend:backend", ("torch",), "torch"),
    "keras-tensorflow": _keras("tensorflow"),
    "keras-jax": _keras("jax"),
    "keras-torch": _keras("torch"),
    "flax-nnx": _flax("nnx"),
    "flax-linen": _flax("linen"),
}


class NotABackendError(ValueError):
    """What was named is no backend, by its spelling or by what is found there."""


def resolve(target: str) -> Backend:
    """Import a backend.

    Args:
        target: "module:object"; the object is a backend, or a class or function that makes one.

    Raises:
        NotABackendError: if the target is not spelled so, there is no such module or object, or the object has not the
            form of the protocol; names what it lacks and what is of another kind.

    Example:
        >>> resolve("torch")
        Traceback (most recent call last):
        ...
        selfattn_core.conformance.protocol.NotABackendError: backend 'torch': expected module:object, for example my_package.conformance:backend.
    """
    module_name, _, attribute = target.partition(":")
    if not is_target(target):
        raise NotABackendError(
            f"backend {target!r}: expected module:object, for example my_package.conformance:backend."
        )
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # That the module imports something that is not installed is no fault of the name.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise NotABackendError(f"backend {target!r}: {error}.") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise NotABackendError(f"backend {target!r}: {module_name} has no {attribute!r}.")
        found = getattr(found, part)
    candidate = _made(target, found)
    problems = _problems(candidate)
    if problems:
        raise NotABackendError(
            f"backend {target!r}: {'; '.join(problems)}; the protocol is selfattn_core.conformance.Backend."
        )
    backend: Backend = candidate
    return backend


def is_target(target: str) -> bool:
    """Whether a backend is spelled as `resolve` wants it; nothing is imported.

    Args:
        target: what may be "module:object".
    """
    module_name, _, attribute = target.partition(":")
    return all(f"{module_name}.{attribute}".split("."))


def declined(backend: Backend, config: SelfAttentionConfig) -> str:
    """Why a backend has no layer for a config; nothing if it has, or does not say."""
    declines = getattr(backend, "declines", None)
    return "" if declines is None else str(declines(config))


def dtypes_of(backend: Backend) -> tuple[str, ...]:
    """What a backend computes in; float32 and float64 if it does not say."""
    return tuple(backend.dtypes()) if hasattr(backend, "dtypes") else _DTYPES


def expected_failures_of(backend: Backend) -> dict[str, tuple[str, str]]:
    """What a backend expects to fail, with reason and link; nothing if it does not say."""
    return dict(backend.expected_failures()) if hasattr(backend, "expected_failures") else {}


def takes_device(backend: Any) -> TypeGuard[Placed]:
    """Whether a backend can be asked for a device."""
    return all(callable(getattr(backend, name, None)) for name in _DEVICES)


_ALWAYS = ("name", "versions", "claims", "layouts", "build")
_DEVICES = ("devices", "on", "places")
_OPTIONAL = ("declines", "update", "eager", "as_shipped", "peak_memory", *_DEVICES)

_SAYS: Mapping[str, tuple[type[Any], str]] = {
    "versions": (Mapping, "a mapping of names to versions"),
    "claims": (Iterable, f"a set of {', '.join(ABILITIES)}"),
    "layouts": (Iterable, f"a tuple of {', '.join(get_args(Layout))}"),
    "dtypes": (Iterable, f"a tuple of {', '.join(DTYPES)}"),
    "expected_failures": (Mapping, "a mapping of runs to (reason, link)"),
    "devices": (Mapping, "a mapping of words to names of devices"),
}
"""What the methods without arguments have to say."""


def _made(target: str, found: Any) -> Any:
    """The backend that a target names, or that is made by what it names."""
    if not callable(found) or (hasattr(found, "build") and not isinstance(found, type)):
        return found
    if needs := _needs(found):
        raise NotABackendError(
            f"backend {target!r}: it is called without arguments to make a backend, and needs {needs}; "
            "name an object that is one, or a function that makes it."
        )
    return found()


def _needs(function: Callable[..., Any]) -> str:
    """The arguments without which it cannot be called."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        # Of some that are written in C it is not known.
        return ""
    given = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return ", ".join(
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.kind not in given
    )


def _problems(candidate: Any) -> list[str]:
    said, problems = _sayings(candidate)
    claims = said.get("claims", [])
    wanted = [*_ALWAYS, *(METHODS[claim] for claim in claims if claim in ABILITIES)]
    missing = [name for name in dict.fromkeys(wanted) if not hasattr(candidate, name)]
    # Where all are None, or not there, a device is not claimed.
    there = [name for name in _DEVICES if getattr(candidate, name, None) is not None]
    missing += [name for name in _DEVICES if there and name not in there]
    problems = ([f"lacks {', '.join(missing)}"] if missing else []) + problems
    problems += _uncallable(candidate, wanted)
    if not isinstance(name := getattr(candidate, "name", ""), str):
        problems.append(f"name is {_short(name)}, where a string is needed")
    for kind, choices in (("claims", ABILITIES), ("layouts", get_args(Layout)), ("dtypes", DTYPES)):
        if strange := [each for each in said.get(kind, []) if each not in choices]:
            problems.append(f"{kind} {', '.join(map(str, strange))}, where there are {', '.join(choices)}")
    devices = said.get("devices", {})
    if strange := [f"{word}: {_short(names)}" for word, names in devices.items() if not _are_names(names)]:
        problems.append(
            f"devices() gives {', '.join(strange)}, "
            "where the names of all devices of a kind are needed, as in ('cpu:0',)"
        )
    if said.get("layouts") == []:
        problems.append("has no layouts, where one of channels_last and channels_first is needed")
    expected = said.get("expected_failures", {})
    # Where something else is wrong, what it would be asked is not known.
    claimed = _claimed_runs(candidate, said) if expected and not problems else None
    return problems + _expectation_problems(expected, claimed)


def _sayings(candidate: Any) -> tuple[dict[str, Any], list[str]]:
    """What the methods without arguments say, mappings as such and the rest as lists; and those that say it wrongly."""
    said: dict[str, Any] = {}
    problems = []
    for method, (kind, expected) in _SAYS.items():
        if not callable(function := getattr(candidate, method, None)):
            continue
        if needs := _needs(function):
            problems.append(f"{method}() needs {needs}, where it is called without arguments")
            continue
        answer: Any = function()
        if not isinstance(answer, kind) or isinstance(answer, str | bytes):
            problems.append(f"{method}() gives {_short(answer)}, where {expected} is needed")
        else:
            said[method] = dict(answer) if kind is Mapping else list(answer)
    return said, problems


def _uncallable(candidate: Any, wanted: Iterable[str]) -> list[str]:
    """The methods that are there and are none."""
    methods = dict.fromkeys([*wanted, *_SAYS, *_OPTIONAL])
    there = {method: getattr(candidate, method) for method in methods if hasattr(candidate, method)}
    return [
        f"{method} is {_short(value)}, where a method is needed"
        for method, value in there.items()
        if method != "name" and not callable(value) and not (method in _OPTIONAL and value is None)
    ]


def _expectation_problems(expected: Mapping[Any, Any], claimed: list[Run] | None) -> list[str]:
    problems = []
    ids = {case.id for case in CASES}
    for key, why in expected.items():
        if str(key).partition("/")[0] not in ids:
            problems.append(f"expects {key} to fail, which is no case")
        elif claimed is not None and not any(run.is_named(key) for run in claimed):
            problems.append(
                f"expects {key} to fail, which names no run that it claims, as in {all_runs()[0].id} or its beginning"
            )
        if not _is_reason(why):
            problems.append(f"expects {key} to fail for {why!r}, where (reason, link) is needed")
    return problems


def _claimed_runs(candidate: Any, said: Mapping[str, Any]) -> list[Run]:
    """What a backend will be asked for, as it is reported."""
    claims, layouts = said["claims"], said["layouts"]
    dtypes = said.get("dtypes", _DTYPES)
    return [
        replace(run, layout=chosen_layout(run, layouts))
        for run in all_runs()
        if is_claimed(run, claims, layouts, dtypes) and not declined(candidate, run.case.config)
    ]


def _short(value: object) -> str:
    words = repr(value)
    return words if len(words) <= 60 else f"{words[:59]}…"


def _are_names(names: object) -> bool:
    return (
        isinstance(names, Sequence)
        and not isinstance(names, str | bytes)
        and all(isinstance(name, str) for name in names)
    )


def _is_reason(why: object) -> bool:
    return (
        isinstance(why, tuple | list)
        and len(why) == 2
        and all(isinstance(part, str) and part for part in why)
    )
