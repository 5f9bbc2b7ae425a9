"""A folder for what is only written to be checked."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selfattn_core.porting.errors import PortError

__all__ = ["scratch_folder"]


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder of temporary files, which is gone afterwards.

    Raises:
        PortError: if it cannot be made or written, which is no fault of the target's.

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
            f"{tempfile.tempdir or 'the folder of temporary files'}: what is ported is first written there to be checked, and "
            f"cannot be: {cause.strerror or cause}. Set TMPDIR to a folder with more room. Nothing was written."
        ) from error
