"""The six backends that ship with this library, and how any other is found, made and checked."""

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

__all__ = ["REGISTRY", "NotABackendError", "Registered", "is_target", "resolve"]


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


_ALWAYS = ("name", "versions", "claims", "layouts", "build")
_OPTIONAL = ("declines", "update", "eager", "as_shipped", "peak_memory", *DEVICE_METHODS)

_SAYS: Mapping[str, tuple[type[Any], str]] = {
    "versions": (Mapping, "a mapping of names to versions"),
    "claims": (Iterable, f"a set of {', '.join(ABILITIES)}"),
    "layouts": (Iterable, f"a tuple of {', '.join(LAYOUTS)}"),
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
    there = [name for name in DEVICE_METHODS if getattr(candidate, name, None) is not None]
    missing += [name for name in DEVICE_METHODS if there and name not in there]
    problems = ([f"lacks {', '.join(missing)}"] if missing else []) + problems
    problems += _uncallable(candidate, wanted)
    if not isinstance(name := getattr(candidate, "name", ""), str):
        problems.append(f"name is {_short(name)}, where a string is needed")
    for kind, choices in (("claims", ABILITIES), ("layouts", LAYOUTS), ("dtypes", DTYPES)):
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
