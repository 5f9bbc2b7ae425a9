"""Measuring the peak memory of a call."""

from collections.abc import Callable
from pathlib import Path

__all__ = ["PeakUnknownError", "peak_growth"]

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


class PeakUnknownError(Exception):
    """The peak memory of a call cannot be measured here. The message gives the reason."""


def peak_growth(call: Callable[[], object]) -> int:
    """The bytes by which the resident memory of this process rises, at its highest, while a call runs.

    Linux can reset the recorded peak of a process. Other systems cannot, so a call that stays below an earlier peak would
    appear to use no memory.

    Args:
        call: the call to measure. It runs once.

    Raises:
        PeakUnknownError: if the system cannot reset the peak. The call does not run.

    Example:
        >>> peak_growth(lambda: None) < 2**26
        True
    """
    try:
        _RESET.write_text("5", encoding="ascii")
    except OSError as error:
        raise PeakUnknownError(
            f"memory cannot be measured here: the peak of the process cannot be reset, which only Linux allows ({error})"
        ) from error
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
