"""A file that is read at any place, and never beyond its end."""

from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import NDArray

from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats.numbers import read_array
from selfattn_core.porting.formats.tensors import TensorInfo

__all__ = ["Source", "unreadable"]


def unreadable(path: Path, error: OSError) -> PortError:
    """The error for a path that the system refuses to read.

    Example:
        >>> unreadable(Path("x.pth"), PermissionError(13, "Permission denied"))
        PortError('x.pth: no permission to read it; see its owner and mode with `ls -l`.')
    """
    if isinstance(error, PermissionError):
        return PortError(f"{path}: no permission to read it; see its owner and mode with `ls -l`.")
    return PortError(f"{path}: cannot be opened: {error.strerror or error}.")


class Source:
    """An open file and its size.

    Args:
        path: the path of the file.

    Raises:
        PortError: if it is missing, empty, not an ordinary file, or not readable.

    Example:
        >>> Source(Path("there-is-no-such.file"))
        Traceback (most recent call last):
        ...
        selfattn_core.porting.errors.PortError: there-is-no-such.file: no such file.
    """

    def __init__(self, path: Path) -> None:
        try:
            if path.is_dir():
                raise PortError(f"{path}: is a folder. Expected a file.")
            if not path.exists():
                raise PortError(f"{path}: no such file.")
            if not path.is_file():
                # Reading a pipe or a device could wait for ever.
                raise PortError(f"{path}: is not an ordinary file. Copy its content to one.")
            self.file: BinaryIO = path.open("rb")
        except OSError as error:
            raise unreadable(path, error) from error
        self.path = path
        self.size = self.file.seek(0, 2)
        if not self.size:
            self.file.close()
            raise PortError(f"{path}: is empty. Expected a checkpoint.")

    def bytes_at(self, offset: int, count: int) -> bytes:
        """Read bytes at a place.

        Raises:
            PortError: if the file ends before them. Then nothing has been allocated.
        """
        if offset < 0 or count < 0 or offset + count > self.size:
            raise PortError(
                f"{self.path}: is truncated or damaged: bytes {offset} to {offset + count} are needed, but it ends at {self.size}."
            )
        self.file.seek(offset)
        content = self.file.read(count)
        if len(content) != count:
            raise PortError(f"{self.path}: has become shorter while it was read.")
        return content

    def read_into(self, buffer: memoryview) -> None:
        """Fill the buffer from the current place.

        Raises:
            EOFError: if the file ends too early.
        """
        view: Any = buffer
        while view:
            count = self.file.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise EOFError("the file ends too early")
            view = view[count:]

    def array_at(self, key: str, offset: int, info: TensorInfo) -> NDArray[Any]:
        """Read a tensor at this offset. The caller has checked that its bytes are within the file."""
        self.file.seek(offset)
        return read_array(f"{self.path}: {key}", info, self.read_into)

    def close(self) -> None:
        """Close the file."""
        self.file.close()
