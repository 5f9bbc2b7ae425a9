"""Devices by name: what is asked for, what there is, and what the process of a backend is told about it.

A device is a word of its framework, and a number where there are several of a kind: "cpu", "cuda:1". Here are words and
numbers only; what is in a machine is for the backend to say, in its own process.
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
"""The kinds of device that each framework has a word for, whether or not there is one; a TPU of TensorFlow needs a strategy
of its own around the training, and is not among them."""

_SPELLED = re.compile(r"([a-z]+)(?::(\d{1,4}))?")


class DeviceUnknownError(ValueError):
    """What was asked for is no device of this framework, or the backend takes none."""


class DeviceAbsentError(Exception):
    """The device is of a known kind, and not in this machine."""


@dataclass(frozen=True)
class Device:
    """What answers were computed on.

    Args:
        name: as its framework says, with its number, as in "cuda:0"; empty where the backend takes no device.
        model: what it is.
        driver: of it; empty where there is none, or it does not tell.
        precisions: the format that the framework's own products of float32 arrays have by default, by product, as
            measured; empty where that was not asked.
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
    """Why a device cannot be asked of a framework; empty if it can.

    Args:
        device: as the user spells it.
        words: the kinds that the framework knows.

    Example:
        >>> device_problem("cuda:1", WORDS["torch"])
        ''
        >>> device_problem("cuda", WORDS["tensorflow"])
        "got device 'cuda'; expected one of cpu, gpu, and with a number where there are several, as in cpu:0"
    """
    spelled = _SPELLED.fullmatch(device.lower())
    if spelled and spelled[1] in words:
        return ""
    return (
        f"got device {device!r}; expected one of {', '.join(words)}, and with a number where there are several, "
        f"as in {next(iter(words), 'cpu')}:0"
    )


def chosen(device: str, here: Mapping[str, Sequence[str]]) -> str:
    """The device that is meant, under its framework's name for it.

    Args:
        device: a word of the framework's, with a number or without, which is the first.
        here: by word, the names of the devices of that kind that there are.

    Raises:
        DeviceUnknownError: if it is no word of the framework's.
        DeviceAbsentError: if there is no such device; says which there are.

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
    """What the process of a backend needs in its environment so that it computes on a device, and holds no other.

    Args:
        framework: that its arrays are of.
        device: as for `chosen`.
        inherited: the environment of this process.

    Returns:
        Values by name; None for a variable that is to be taken out.

    Example:
        >>> device_variables("jax", "cpu", {})
        {'CUDA_VISIBLE_DEVICES': '', 'JAX_PLATFORMS': 'cpu'}
        >>> device_variables("jax", "cuda", {"JAX_PLATFORMS": "cpu"})
        {'JAX_PLATFORMS': None}
    """
    if kind_of(device.lower()) == "cpu":
        # JAX would compute on a card that it finds, and TensorFlow take its memory.
        hidden: dict[str, str | None] = {"CUDA_VISIBLE_DEVICES": ""}
        return hidden | ({"JAX_PLATFORMS": "cpu"} if framework == "jax" else {})
    return {"JAX_PLATFORMS": None} if "JAX_PLATFORMS" in inherited and framework == "jax" else {}
