"""Facts about the machine that come from the operating system, not from a framework."""

import platform
from pathlib import Path

__all__ = ["nvidia_driver", "processor"]


def processor() -> str:
    """The model of the CPU.

    Example:
        >>> bool(processor())
        True
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def nvidia_driver() -> str:
    """The version of the NVIDIA driver, read from Linux, or "" if there is none."""
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="utf-8").strip()
    except OSError:
        return ""
