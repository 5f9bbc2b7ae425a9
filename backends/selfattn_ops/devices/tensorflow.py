"""The devices of TensorFlow."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from selfattn_core.installed import require

require("selfattn_ops.devices.tensorflow", ["tensorflow"], "tensorflow")

import tensorflow as tf  # noqa: E402 - the message above must come first

from selfattn_core.arrays import Array  # noqa: E402
from selfattn_core.conformance.questions.peak_memory import peak_growth  # noqa: E402
from selfattn_ops.devices.hosts import nvidia_driver, processor  # noqa: E402
from selfattn_ops.devices.placed import OnDevice  # noqa: E402

__all__ = ["OnDevices", "about", "devices", "peak_memory"]


def devices() -> dict[str, tuple[str, ...]]:
    """The names of the devices of this machine, by TensorFlow's word for their kind, in lower case.

    Example:
        >>> devices()["cpu"][0]
        'cpu:0'
    """
    return {
        kind: tuple(_name(device.name) for device in tf.config.list_logical_devices(kind.upper()))
        for kind in ("cpu", "gpu")
    }


def about(device: str) -> dict[str, str]:
    """Model and driver of one of `devices`.

    Example:
        >>> sorted(about("cpu:0"))
        ['driver', 'model']
    """
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return {"model": processor(), "driver": ""}
    found = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[int(index)])
    runtime = tf.sysconfig.get_build_info().get("cuda_version", "")
    parts = (nvidia_driver(), f"CUDA {runtime}" if runtime else "")
    return {
        "model": str(found.get("device_name", "GPU")),
        "driver": ", ".join(part for part in parts if part),
    }


def peak_memory(call: Callable[[], object], device: str) -> int:
    """Bytes by which a call raises the memory of a device at its peak, by TensorFlow's own counters.

    Args:
        call: the function to measure. It is called once.
        device: one of `devices`. On the CPU the resident memory of this process is measured.
    """
    if device.startswith("cpu"):
        return peak_growth(call)
    tf.config.experimental.reset_memory_stats(device.upper())
    before = tf.config.experimental.get_memory_info(device.upper())["current"]
    call()
    return max(0, int(tf.config.experimental.get_memory_info(device.upper())["peak"]) - before)


class OnDevices(OnDevice):
    """The questions about devices that the kit asks a backend."""

    def devices(self) -> Mapping[str, tuple[str, ...]]:
        """The devices of TensorFlow."""
        return devices()

    @contextmanager
    def on(self, device: str) -> Iterator[Mapping[str, str]]:
        """Run operations on this device inside a `with` block."""
        self.device = device
        try:
            with tf.device(f"/{device.upper()}"):
                yield about(device)
        finally:
            self.device = "cpu:0"

    def noted(self, tensor: tf.Tensor) -> tf.Tensor:
        """The same tensor. The backend remembers its device."""
        self.note([_name(tensor.device)])
        return tensor

    def peak_memory(self, call: Callable[[], object]) -> int:
        """The peak, by the counters of the device."""
        return peak_memory(call, self.device)

    def default_products(self, left: Array, right: Array) -> dict[str, Array]:
        """The product of two matrices, and the same product as a 1×1 convolution, in the default precision of TensorFlow."""
        a, b = tf.constant(left), tf.constant(right)
        convolved = tf.nn.conv2d(a[None, :, None, :], b[None, None], 1, "VALID")
        return {
            "matrix product": self.noted(tf.matmul(a, b)).numpy(),
            "convolution": self.noted(convolved).numpy()[0, :, 0],
        }


def _name(device: str) -> str:
    """The short name of a device: "gpu:0" for "/job:localhost/replica:0/task:0/device:GPU:0"."""
    return ":".join(device.split(":")[-2:]).lower()
