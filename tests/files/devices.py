"""Devices to be written to, which a faulty build that runs as root must not be able to take from the machine."""

import os
import stat
from pathlib import Path

__all__ = ["FULL", "HOLE", "make_device"]

HOLE = 3
"""Minor number of /dev/null."""
FULL = 7
"""Minor number of /dev/full."""

_MEMORY_DEVICES = 1


def make_device(path: Path, minor: int) -> None:
    """A node of our own where we may make one, or else a link to the machine's, which we may not replace either."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(_MEMORY_DEVICES, minor))
    except PermissionError:
        path.symlink_to({HOLE: "/dev/null", FULL: "/dev/full"}[minor])
