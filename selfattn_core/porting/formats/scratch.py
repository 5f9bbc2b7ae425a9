"""A temporary folder for files that are written only to be checked."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selfattn_core.porting.errors import PortError

__all__ = ["scratch_folder"]


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder, which is removed afterwards.

    Raises:
        PortError: if the folder cannot be created or written. The target is not the cause.

    Example:
        >>> with scratch_folder() as folder:
        ...     folder.is_dir()
        True
    """
    try:
        with tempfile.TemporaryDirectory(prefix="selfattn-port-") as folder:
            yield Path(folder)
    except (OSError, PortError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise PortError(
            f"{tempfile.tempdir or 'the folder of temporary files'}: what is ported is first written there to be checked, but that "
            f"failed: {cause.strerror or cause}. Set TMPDIR to a folder with more room. Nothing was written."
        ) from error
