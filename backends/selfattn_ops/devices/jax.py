"""The devices of JAX."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from selfattn_core.installed import require

require("selfattn_ops.devices.jax", ["jax"], "jax")

import jax  # noqa: E402 - the message above must come first
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from selfattn_core.arrays import Array  # noqa: E402
from selfattn_core.conformance.questions.peak_memory import PeakUnknownError, peak_growth  # noqa: E402
from selfattn_ops.devices.hosts import nvidia_driver, processor  # noqa: E402
from selfattn_ops.devices.placed import OnDevice  # noqa: E402

__all__ = ["OnDevices", "about", "devices", "peak_memory"]


_KINDS = ("cpu", "gpu", "cuda", "rocm", "tpu")


def devices() -> dict[str, tuple[str, ...]]:
    """The names of the devices that there are, by JAX's words for their kinds; a card has two words.

    Example:
        >>> devices()["cpu"][0]
        'cpu:0'
    """
    return {kind: tuple(map(_name, _of_kind(kind))) for kind in _KINDS}


def about(device: str) -> dict[str, str]:
    """Model and driver of one of `devices`.

    Example:
        >>> sorted(about("cpu:0"))
        ['driver', 'model']
    """
    found = _device(device)
    if found.platform == "cpu":
        return {"model": processor(), "driver": ""}
    platform = " ".join(str(found.client.platform_version).split())
    driver = ", ".join(
        part for part in (nvidia_driver() if found.platform == "gpu" else "", platform) if part
    )
    return {"model": str(found.device_kind), "driver": driver}


def peak_memory(call: Callable[[], object], device: str) -> int:
    """Bytes by which the memory of a device rises, at its highest, while a call runs; by JAX's own counters.

    Args:
        call: what to measure; it is called once.
        device: one of `devices`; on the CPU it is the resident memory of this process.

    Raises:
        PeakUnknownError: if the device does not count, or, for its peak is never reset, the call stayed below an
            earlier one.
    """
    found = _device(device)
    if found.platform == "cpu":
        return peak_growth(call)
    before = found.memory_stats() or {}
    if not {"bytes_in_use", "peak_bytes_in_use"} <= set(before):
        raise PeakUnknownError(f"memory cannot be measured on {device}: it keeps no peak")
    jax.block_until_ready(call())
    after = (found.memory_stats() or {})["peak_bytes_in_use"]
    return peak_between(before, after)


def peak_between(before: Mapping[str, int], peak: int) -> int:
    """How far above what was in use a new peak is.

    Args:
        before: the device's counters before the call.
        peak: its peak after the call.

    Raises:
        PeakUnknownError: if the peak is that of an earlier call.

    Example:
        >>> peak_between({"bytes_in_use": 10, "peak_bytes_in_use": 30}, 45)
        35
    """
    if peak == before["peak_bytes_in_use"] > before["bytes_in_use"]:
        raise PeakUnknownError(
            f"memory cannot be measured here: the call stayed below an earlier peak of {peak / 2**20:.0f} MiB, "
            "which JAX does not forget"
        )
    return max(0, peak - before["bytes_in_use"])


class OnDevices(OnDevice):
    """What a backend of the kit is asked about devices."""

    def devices(self) -> Mapping[str, tuple[str, ...]]:
        """Those of JAX."""
        return devices()

    @contextmanager
    def on(self, device: str) -> Iterator[Mapping[str, str]]:
        """In between, this is the default device."""
        self.device = device
        try:
            with jax.default_device(_device(device)):
                yield about(device)
        finally:
            self.device = "cpu:0"

    def noted(self, array: jax.Array) -> jax.Array:
        """The same array, whose place is remembered."""
        self.note(map(_name, array.devices()))
        return array

    def peak_memory(self, call: Callable[[], object]) -> int:
        """By the counters of the device."""
        return peak_memory(call, self.device)

    def default_products(self, left: Array, right: Array) -> dict[str, Array]:
        """The product of two matrices, and the same as a 1×1 convolution, as JAX computes them unless told otherwise."""
        a, b = jnp.asarray(left), jnp.asarray(right)
        convolved = jax.lax.conv_general_dilated(
            a[None, :, None, :], b[None, None], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return {
            "matrix product": np.asarray(self.noted(a @ b)),
            "convolution": np.asarray(self.noted(convolved))[0, :, 0],
        }


def _of_kind(kind: str) -> list[Any]:
    try:
        return list(jax.local_devices(backend=kind))
    except RuntimeError:  # JAX has no platform of that name here.
        return []


def _device(name: str) -> Any:
    kind = name.partition(":")[0]
    return next(device for device in _of_kind(kind) if _name(device) == name)


def _name(device: Any) -> str:
    return f"{device.platform}:{device.id}"
