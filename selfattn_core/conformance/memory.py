"""How much memory a call takes at its peak."""

import sys
from collections.abc import Callable
from pathlib import Path

__all__ = ["peak_growth"]

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def peak_growth(call: Callable[[], object]) -> int:
    """Bytes by which the resident memory of this process rises, at its highest, while the call runs.

    Linux can forget the peak that a process has had. Elsewhere only a new record is seen, and what stays below an
    earlier peak counts as nothing.

    Args:
        call: what to measure; it is called once.

    Example:
        >>> peak_growth(lambda: None) < 2**26
        True
    """
    if _forget_peak():
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    before = _record()
    call()
    return max(0, _record() - before)


def _forget_peak() -> bool:
    try:
        _RESET.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _status(name: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _record() -> int:
    import resource  # which Windows does not have

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
