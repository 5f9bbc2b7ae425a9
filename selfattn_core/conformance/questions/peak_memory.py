"""How much memory a call takes at its peak."""

from collections.abc import Callable
from pathlib import Path

__all__ = ["PeakUnknownError", "peak_growth"]

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


class PeakUnknownError(Exception):
    """The peak of a call cannot be told from earlier ones here; why is the message."""


def peak_growth(call: Callable[[], object]) -> int:
    """Bytes by which the resident memory of this process rises, at its highest, while the call runs.

    Linux can forget the peak that a process has had. Elsewhere only a new record would be seen, and what stays below an
    earlier peak would count as nothing.

    Args:
        call: what to measure; it is called once.

    Raises:
        PeakUnknownError: if the system does not forget; nothing is called.

    Example:
        >>> peak_growth(lambda: None) < 2**26
        True
    """
    try:
        _RESET.write_text("5", encoding="ascii")
    except OSError as error:
        raise PeakUnknownError(
            f"memory cannot be measured here: the peak of the process cannot be reset ({error}), as on Linux"
        ) from error
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
