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
    """The names of the devices of this machine, by JAX's words for their kinds. A card has two words.

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
    """Bytes by which a call raises the memory of a device at its peak, by JAX's own counters.

    Args:
        call: the function to measure. It is called once.
        device: one of `devices`. On the CPU the resident memory of this process is measured.

    Raises:
        PeakUnknownError: if the device has no counter, or if the call stayed below an earlier peak, which JAX cannot
            reset.
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
    """Bytes between the memory in use before a call and the peak after it.

    Args:
        before: the device's counters before the call.
        peak: its peak after the call.

    Raises:
        PeakUnknownError: if the peak belongs to an earlier call.

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
    """The questions about devices that the kit asks a backend."""

    def devices(self) -> Mapping[str, tuple[str, ...]]:
        """The devices of JAX."""
        return devices()

    @contextmanager
    def on(self, device: str) -> Iterator[Mapping[str, str]]:
        """Make this the default device inside a `with` block."""
        self.device = device
        try:
            with jax.default_device(_device(device)):
                yield about(device)
        finally:
            self.device = "cpu:0"

    def noted(self, array: jax.Array) -> jax.Array:
        """The same array. The backend remembers its device."""
        self.note(map(_name, array.devices()))
        return array

    def peak_memory(self, call: Callable[[], object]) -> int:
        """The peak, by the counters of the device."""
        return peak_memory(call, self.device)

    def default_products(self, left: Array, right: Array) -> dict[str, Array]:
        """The product of two matrices, and the same product as a 1×1 convolution, in the default precision of JAX."""
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
