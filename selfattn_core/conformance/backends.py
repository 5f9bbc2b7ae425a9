"""The six built-in backends, and the function that imports and checks any other."""

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from selfattn_core.conformance.cases.case import DTYPES, LAYOUTS, Run
from selfattn_core.conformance.cases.table import CASES, all_runs
from selfattn_core.conformance.protocol import (
    ABILITIES,
    DEFAULT_DTYPES,
    DEVICE_METHODS,
    METHODS,
    Backend,
    Claims,
    declined,
)

__all__ = ["KNOWN", "OVER_PROCESSES", "REGISTRY", "NotABackendError", "Registered", "is_target", "resolve"]


@dataclass(frozen=True)
class Registered:
    """Where a built-in backend is, and what its process needs.

    Args:
        target: "module:object".
        requires: the import names that it needs.
        extra: the extra of this library that installs them.
        environment: the environment variables to set before the first import.
        precision: further variables. They either set full precision for float32, or set a lower one to test that the layer
            overrides it. They are not set where the kit tests the framework's defaults.
    """

    target: str
    requires: tuple[str, ...]
    extra: str
    environment: Mapping[str, str] = field(default_factory=dict)
    precision: Mapping[str, str] = field(default_factory=dict)

    @property
    def framework(self) -> str:
        """The import name of the framework."""
        return self.requires[-1]

    @property
    def in_full(self) -> dict[str, str]:
        """The environment variables of a process that checks float32 at full precision."""
        return {**self.environment, **self.precision}


def _keras(framework: str) -> Registered:
    return Registered(
        "selfattn_keras.conformance.backend:backend",
        ("keras", framework),
        f"keras-{framework}",
        {"KERAS_BACKEND": framework},
    )


def _flax(kind: str) -> Registered:
    # These layers set their own precision. They must compute at full precision under this default too. On a CPU it rounds
    # operands in float64 only.
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


OVER_PROCESSES: Mapping[str, Registered] = {
    "torch-rows": Registered("selfattn_torch.conformance.rows:RowsBackend", ("torch",), "torch"),
}
"""Built-in backends that compute over several processes of their own. They run only if they are named."""

KNOWN: Mapping[str, Registered] = {**REGISTRY, **OVER_PROCESSES}
"""All backends that have a name."""


class NotABackendError(ValueError):
    """The named object is not a backend, or the name has the wrong form."""


def resolve(target: str) -> Backend:
    """Import a backend.

    Args:
        target: "module:object". The object is a backend, or a class or function that returns one.

    Raises:
        NotABackendError: if the target has another form, if the module or the object does not exist, or if the object
            does not follow the protocol. The message lists every problem.

    Example:
        >>> resolve("torch")
        Traceback (most recent call last):
        ...
        selfattn_core.conformance.backends.NotABackendError: backend 'torch': expected module:object, for example my_package.conformance:backend.
    """
    module_name, _, attribute = target.partition(":")
    if not is_target(target):
        raise NotABackendError(
            f"backend {target!r}: expected module:object, for example my_package.conformance:backend."
        )
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # The name is right if the missing module is one that this module imports.
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
    """Whether a name has the form that `resolve` expects. This imports nothing.

    Args:
        target: the name.
    """
    module_name, _, attribute = target.partition(":")
    return all(f"{module_name}.{attribute}".split("."))


_ALWAYS = ("name", "versions", "claims", "layouts", "build")
_OPTIONAL = ("declines", "update", "eager", "as_shipped", "peak_memory", "over", *DEVICE_METHODS)

_SAYS: Mapping[str, tuple[type[Any], str]] = {
    "versions": (Mapping, "a mapping of names to versions"),
    "claims": (Iterable, f"a set of {', '.join(ABILITIES)}"),
    "layouts": (Iterable, f"a tuple of {', '.join(LAYOUTS)}"),
    "dtypes": (Iterable, f"a tuple of {', '.join(DTYPES)}"),
    "expected_failures": (Mapping, "a mapping of runs to (reason, link)"),
    "devices": (Mapping, "a mapping of words to names of devices"),
}
"""The type of the answer of each method without arguments, and the words for it in messages."""


def _made(target: str, found: Any) -> Any:
    """The named backend. The named class or function is called to make it."""
    if not callable(found) or (hasattr(found, "build") and not isinstance(found, type)):
        return found
    if needs := _needs(found):
        raise NotABackendError(
            f"backend {target!r}: the kit calls it without arguments to make a backend, but it needs {needs}; "
            "name a backend object, or a function that needs no arguments."
        )
    return found()


def _needs(function: Callable[..., Any]) -> str:
    """The names of the required arguments, separated by commas."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        # Some functions written in C have no signature.
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
    # A backend without these methods, or with None for all of them, claims no device.
    there = [name for name in DEVICE_METHODS if getattr(candidate, name, None) is not None]
    missing += [name for name in DEVICE_METHODS if there and name not in there]
    problems = ([f"lacks {', '.join(missing)}"] if missing else []) + problems
    problems += _uncallable(candidate, wanted)
    if not isinstance(name := getattr(candidate, "name", ""), str):
        problems.append(f"name is {_short(name)}, expected a string")
    for kind, choices in (("claims", ABILITIES), ("layouts", LAYOUTS), ("dtypes", DTYPES)):
        if strange := [each for each in said.get(kind, []) if each not in choices]:
            problems.append(f"{kind} {', '.join(map(str, strange))}, expected some of {', '.join(choices)}")
    devices = said.get("devices", {})
    if strange := [f"{word}: {_short(names)}" for word, names in devices.items() if not _are_names(names)]:
        problems.append(
            f"devices() returns {', '.join(strange)}, "
            "expected the names of all devices of a kind, as in ('cpu:0',)"
        )
    if said.get("layouts") == []:
        problems.append("has no layouts, expected channels_last, channels_first or both")
    expected = said.get("expected_failures", {})
    # With any other problem, the claimed runs are unknown.
    claimed = _claimed_runs(candidate, said) if expected and not problems else None
    return problems + _expectation_problems(expected, claimed)


def _sayings(candidate: Any) -> tuple[dict[str, Any], list[str]]:
    """The answers of the methods without arguments, as mappings or lists, and the problems with them."""
    said: dict[str, Any] = {}
    problems = []
    for method, (kind, expected) in _SAYS.items():
        if not callable(function := getattr(candidate, method, None)):
            continue
        if needs := _needs(function):
            problems.append(f"{method}() needs {needs}, but the kit calls it without arguments")
            continue
        answer: Any = function()
        if not isinstance(answer, kind) or isinstance(answer, str | bytes):
            problems.append(f"{method}() returns {_short(answer)}, expected {expected}")
        else:
            said[method] = dict(answer) if kind is Mapping else list(answer)
    return said, problems


def _uncallable(candidate: Any, wanted: Iterable[str]) -> list[str]:
    """A problem for each attribute that should be a method and is not callable."""
    methods = dict.fromkeys([*wanted, *_SAYS, *_OPTIONAL])
    there = {method: getattr(candidate, method) for method in methods if hasattr(candidate, method)}
    return [
        f"{method} is {_short(value)}, expected a method"
        for method, value in there.items()
        if method != "name" and not callable(value) and not (method in _OPTIONAL and value is None)
    ]


def _expectation_problems(expected: Mapping[Any, Any], claimed: list[Run] | None) -> list[str]:
    problems = []
    ids = {case.id for case in CASES}
    for key, why in expected.items():
        if str(key).partition("/")[0] not in ids:
            problems.append(f"expects {key} to fail, but there is no such case")
        elif claimed is not None and not any(run.is_named(key) for run in claimed):
            problems.append(
                f"expects {key} to fail, but claims no run of that name; "
                f"expected a name such as {all_runs()[0].id}, or its beginning"
            )
        if not _is_reason(why):
            problems.append(f"expects {key} to fail for {why!r}, expected (reason, link)")
    return problems


def _claimed_runs(candidate: Any, said: Mapping[str, Any]) -> list[Run]:
    """The runs that the kit will ask a backend for, as reports name them."""
    claims = Claims(said["claims"], said["layouts"], said.get("dtypes", DEFAULT_DTYPES))
    return [
        replace(run, layout=claims.layout(run))
        for run in all_runs()
        if claims.covers(run) and not declined(candidate, run.case.config)
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
