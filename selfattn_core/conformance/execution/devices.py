"""Devices by name: checking a requested name, choosing a device, and the environment variables for it.

A device name is a word of its framework, with a number if there are several devices of that kind: "cpu", "cuda:1". This
file only handles names. The backend lists the devices of a machine, in its own process.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = [
    "WORDS",
    "Device",
    "DeviceAbsentError",
    "DeviceUnknownError",
    "chosen",
    "device_problem",
    "device_variables",
    "kind_of",
]

WORDS: Mapping[str, tuple[str, ...]] = {
    "torch": ("cpu", "cuda", "mps", "xpu"),
    "jax": ("cpu", "gpu", "cuda", "rocm", "tpu"),
    "tensorflow": ("cpu", "gpu"),
}
"""The words for kinds of device in each framework. A TPU in TensorFlow is not included, because it needs a strategy around
the training."""

_SPELLED = re.compile(r"([a-z]+)(?::(\d{1,4}))?")


class DeviceUnknownError(ValueError):
    """The framework has no kind of device with this name, or the backend accepts no device."""


class DeviceAbsentError(Exception):
    """The kind of device is known, but this machine does not have the device."""


@dataclass(frozen=True)
class Device:
    """The device that computed the answers.

    Args:
        name: the framework's name for it, with a number, such as "cuda:0". Empty if the backend accepts no device.
        model: the model of the device.
        driver: the version of its driver. Empty if it has none, or if it is unknown.
        precisions: the measured format of the framework's default products of float32 arrays, by product. Empty if it was
            not measured.
    """

    name: str = ""
    model: str = ""
    driver: str = ""
    precisions: Mapping[str, str] = field(default_factory=dict)


def kind_of(device: str) -> str:
    """The word of a device, without its number.

    Example:
        >>> kind_of("cuda:1")
        'cuda'
    """
    return device.partition(":")[0]


def device_problem(device: str, words: Sequence[str]) -> str:
    """The reason why a framework cannot have a device of this name. Empty if it can.

    Args:
        device: the name that the user gave.
        words: the framework's words for kinds of device.

    Example:
        >>> device_problem("cuda:1", WORDS["torch"])
        ''
        >>> device_problem("cuda", WORDS["tensorflow"])
        "got device 'cuda'; expected one of cpu, gpu, with a number if there are several, as in cpu:0"
    """
    spelled = _SPELLED.fullmatch(device.lower())
    if spelled and spelled[1] in words:
        return ""
    return (
        f"got device {device!r}; expected one of {', '.join(words)}, with a number if there are several, "
        f"as in {next(iter(words), 'cpu')}:0"
    )


def chosen(device: str, here: Mapping[str, Sequence[str]]) -> str:
    """The framework's name of the requested device.

    Args:
        device: a word of the framework, with or without a number. Without a number it is the first device.
        here: the names of the devices of this machine, for each word.

    Raises:
        DeviceUnknownError: if the framework does not have the word.
        DeviceAbsentError: if the machine does not have the device. The message lists the devices that it has.

    Example:
        >>> chosen("cuda:1", {"cpu": ("cpu:0",), "cuda": ("gpu:0", "gpu:1")})
        'gpu:1'
    """
    if problem := device_problem(device, tuple(here)):
        raise DeviceUnknownError(f"{problem}.")
    word, _, number = device.lower().partition(":")
    names, index = here[word], int(number or 0)
    if index >= len(names):
        there = ", ".join(dict.fromkeys(name for each in here.values() for name in each)) or "none"
        raise DeviceAbsentError(f"there is no device {device!r} here; there are: {there}.")
    return names[index]


def device_variables(framework: str, device: str, inherited: Mapping[str, str]) -> dict[str, str | None]:
    """The environment variables with which the process of a backend uses one device and reserves no other.

    Args:
        framework: the framework of the backend.
        device: as for `chosen`.
        inherited: the environment of this process.

    Returns:
        Values by name. None means that the variable must be removed.

    Example:
        >>> device_variables("jax", "cpu", {})
        {'CUDA_VISIBLE_DEVICES': '', 'JAX_PLATFORMS': 'cpu'}
        >>> device_variables("jax", "cuda", {"JAX_PLATFORMS": "cpu"})
        {'JAX_PLATFORMS': None}
    """
    if kind_of(device.lower()) == "cpu":
        # Otherwise JAX would compute on an accelerator that it finds, and TensorFlow would reserve its memory.
        hidden: dict[str, str | None] = {"CUDA_VISIBLE_DEVICES": ""}
        return hidden | ({"JAX_PLATFORMS": "cpu"} if framework == "jax" else {})
    return {"JAX_PLATFORMS": None} if "JAX_PLATFORMS" in inherited and framework == "jax" else {}
