"""The devices of PyTorch."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from selfattn_core.installed import require

require("selfattn_ops.devices.torch", ["torch"], "torch")

import torch  # noqa: E402 - the message above must come first

from selfattn_core.arrays import Array  # noqa: E402
from selfattn_core.conformance.questions.peak_memory import PeakUnknownError, peak_growth  # noqa: E402
from selfattn_ops.devices.hosts import nvidia_driver, processor  # noqa: E402
from selfattn_ops.devices.placed import OnDevice  # noqa: E402

__all__ = ["OnDevices", "about", "devices", "peak_memory"]


def devices() -> dict[str, tuple[str, ...]]:
    """The names of the devices of this machine, by torch's word for their kind.

    Example:
        >>> devices()["cpu"]
        ('cpu:0',)
    """
    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
        "xpu": torch.xpu.device_count(),
    }
    return {kind: tuple(f"{kind}:{index}" for index in range(count)) for kind, count in counts.items()}


def about(device: str) -> dict[str, str]:
    """Model and driver of one of `devices`.

    Example:
        >>> sorted(about("cpu:0"))
        ['driver', 'model']
    """
    kind = device.partition(":")[0]
    if kind == "cuda":
        runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
        return {"model": torch.cuda.get_device_name(device), "driver": _joined(nvidia_driver(), runtime)}
    if kind == "xpu":
        found = torch.xpu.get_device_properties(device)
        return {"model": found.name, "driver": str(getattr(found, "driver_version", ""))}
    return {"model": processor(), "driver": ""}


def peak_memory(call: Callable[[], object], device: str) -> int:
    """Bytes by which a call raises the memory of a device at its peak, by torch's own counters.

    Args:
        call: the function to measure. It is called once.
        device: one of `devices`. On the CPU the resident memory of this process is measured.

    Raises:
        PeakUnknownError: if torch has no peak counter for this kind of device. Then `call` is not called.
    """
    kind = device.partition(":")[0]
    if kind == "cpu":
        return peak_growth(call)
    counters = {"cuda": torch.cuda, "xpu": torch.xpu}
    if kind not in counters:
        raise PeakUnknownError(f"memory cannot be measured on {device}: torch keeps no peak of it")
    counter = counters[kind]
    counter.synchronize(device)
    counter.reset_peak_memory_stats(device)
    before = counter.memory_allocated(device)
    call()
    counter.synchronize(device)
    return max(0, int(counter.max_memory_allocated(device)) - before)


class OnDevices(OnDevice):
    """The questions about devices that the kit asks a backend."""

    def devices(self) -> Mapping[str, tuple[str, ...]]:
        """The devices of torch."""
        return devices()

    @contextmanager
    def on(self, device: str) -> Iterator[Mapping[str, str]]:
        """Build layers and inputs on this device inside a `with` block."""
        self.device = device
        try:
            yield about(device)
        finally:
            self.device = "cpu:0"

    def noted(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same tensor. The backend remembers its device."""
        self.note([f"{tensor.device.type}:{tensor.device.index or 0}"])
        return tensor

    def peak_memory(self, call: Callable[[], object]) -> int:
        """The peak, by the counters of the device."""
        return peak_memory(call, self.device)

    def default_products(self, left: Array, right: Array) -> dict[str, Array]:
        """The product of two matrices, and the same product as a 1×1 convolution, in the default precision of torch."""
        a, b = (torch.from_numpy(matrix).to(self.device) for matrix in (left, right))
        image = a.T[None, :, None, :].contiguous()
        convolved = torch.nn.functional.conv2d(image, b.T[:, :, None, None].contiguous())
        return {
            "matrix product": self.noted(a @ b).cpu().numpy(),
            "convolution": self.noted(convolved)[0, :, 0].T.cpu().numpy(),
        }


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
