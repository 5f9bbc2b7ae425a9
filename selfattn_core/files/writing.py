"""Writing a file or a folder atomically: the target is complete or absent.

The content is first written to a hidden folder beside the target, `.NAME.<digits>.tmp`, and then moved to its place in one
step. A process that is killed leaves that folder behind, and the next process that writes the same target removes it. A
lock, which ends with its process, shows whether another process still writes into such a folder.

A device, a pipe or a descriptor of this process (`/dev/stdout`, or what a shell's process substitution names) cannot be
replaced. The content is written into it.

Why not a library: atomicwrites is no longer maintained, and it replaces single files only: no folders, no pipes or devices,
and it does not remove what killed processes left.
"""

import ctypes
import errno
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = [
    "check_room",
    "is_standard_output",
    "own_descriptor",
    "workplace",
    "write_atomically",
    "write_folder_atomically",
]


def write_atomically(path: Path, content: bytes | Iterable[bytes | memoryview], *, overwrite: bool) -> None:
    """Write the content so that the file is never incomplete, even after a crash or on a full disk.

    Args:
        path: the target. Symbolic links are followed. A target that is not a regular file is written into.
        content: all bytes of the file, in one or several pieces.
        overwrite: whether an existing target may be replaced or written into.

    Raises:
        FileExistsError: if the target exists and `overwrite` is False.
        OSError: if it cannot be written. An existing file then stays unchanged. The error names the target.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomically(Path(folder) / "report.json", b"{}", overwrite=False)
        ...     [child.name for child in Path(folder).iterdir()]
        ['report.json']
    """
    pieces = [content] if isinstance(content, bytes) else content
    with _named(path):
        descriptor = own_descriptor(path)
        kind = _kind(path)
        if kind is not None and stat.S_ISDIR(kind):
            raise IsADirectoryError(f"{path}: is a folder; name a file in it. Nothing was written.")
        if kind is not None and not overwrite:
            raise FileExistsError(_exists(path))
        if descriptor is not None or (kind is not None and not stat.S_ISREG(kind)):
            _write_into(path, descriptor, kind, pieces)
            return
        target = _parent_checked(path)
        with workplace(target) as folder:
            made = folder / "content"
            # "x" gives the new file the permissions of the process' umask.
            with made.open("xb") as file:
                _write_pieces(file.fileno(), pieces)
                os.fsync(file.fileno())
            if overwrite:
                made.replace(target)
            else:
                _link_new(made, target, path)


@contextmanager
def write_folder_atomically(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary path for a new folder. It replaces the target when the block ends without an exception.

    Args:
        path: the target. Symbolic links are followed.
        overwrite: whether an existing folder may be replaced.

    Yields:
        A path that does not exist yet.

    Raises:
        FileExistsError: if the target exists and `overwrite` is False.
        OSError: if it cannot be written. An existing folder then stays unchanged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with write_folder_atomically(Path(folder) / "checkpoint", overwrite=False) as place:
        ...         place.mkdir()
        ...     [child.name for child in Path(folder).iterdir()]
        ['checkpoint']
    """
    with _named(path), workplace(target := _parent_checked(path)) as folder:
        made = folder / target.name
        yield made
        if target.exists() and not overwrite:
            raise FileExistsError(_exists(path))
        if not target.exists():
            made.rename(target)
        elif not _exchange(made, target):
            # Two steps, if the system cannot exchange folders in one. If the process dies between them, the next process
            # finds the old folder in the workplace.
            before = folder / _BEFORE
            target.rename(before)
            try:
                made.rename(target)
            except BaseException:
                before.rename(target)
                raise


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """A hidden folder beside the target, on its file system. It is removed afterwards.

    Hidden folders that killed processes left for the same target are removed too.

    Args:
        target: the path to write.

    Raises:
        OSError: if this place is not writable.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with workplace(Path(parent) / "layer.npz") as folder:
        ...         folder.name.startswith(".layer.npz."), folder.parent == Path(parent)
        ...     list(Path(parent).iterdir())
        (True, True)
        []
    """
    _remove_abandoned(target)
    folder, lock = _locked_folder(target)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def check_room(folder: Path, size: int) -> None:
    """Check for free space, for a library that fails badly on a full disk.

    Args:
        folder: the folder to write into.
        size: size in bytes.

    Raises:
        OSError: if there is not enough space. Nothing is raised if the system does not know.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     check_room(Path(folder), 1000)
    """
    reserve = getattr(os, "posix_fallocate", None)
    if reserve is None:
        return
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            reserve(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV):
                raise


def own_descriptor(path: str | os.PathLike[str]) -> int | None:
    """The number of this process' open file that a path names, or None.

    Args:
        path: a path such as `/dev/stdout` or `/dev/fd/63`. Symbolic links are followed.

    Example:
        >>> own_descriptor("/dev/stdout"), own_descriptor("layer.npz")
        (1, None)
    """
    opened = (f"/proc/{os.getpid()}/fd", "/dev/fd")
    place = os.path.abspath(path)  # noqa: PTH100 - resolving would follow the links that are looked for
    for _ in range(_MOST_LINKS):
        folder, name = os.path.split(place)
        if name.isdecimal() and (folder in opened or os.path.realpath(folder) in opened):
            return int(name)
        if not Path(place).is_symlink():
            return None
        place = os.path.join(folder, Path(place).readlink())  # noqa: PTH118 - a path that begins at the root stays itself
    return None


def is_standard_output(path: str | os.PathLike[str]) -> bool:
    """Whether a path is another name of this process' standard output.

    Example:
        >>> is_standard_output("/dev/stdout"), is_standard_output("/dev/stderr")
        (True, False)
    """
    return own_descriptor(path) == _STANDARD_OUTPUT


def _exists(path: Path) -> str:
    return f"{path}: exists already and was left as it is; pass overwrite=True to replace it."


def _kind(path: Path) -> int | None:
    """The mode bits of the target, with links followed, or None if it does not exist."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def _parent_checked(path: Path) -> Path:
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: no such folder; nothing was written.")
    return target


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn a system error about a hidden file, or about no file, into one about the target."""
    try:
        yield
    except OSError as error:
        # Our own messages have no errno and stay.
        if error.errno is None or error.filename == str(path):
            raise
        raise type(error)(error.errno, error.strerror or str(error), str(path)) from error


def _write_into(
    path: Path, descriptor: int | None, kind: int | None, pieces: Iterable[bytes | memoryview]
) -> None:
    """Write into a target that cannot be replaced."""
    if kind is not None and stat.S_ISBLK(kind):
        raise OSError(f"{path}: is a disk; name a file on it. Nothing was written.")
    if descriptor == _STANDARD_OUTPUT:
        sys.stdout.flush()
    if descriptor is not None:
        # Opening it again would write a regular file behind it from its beginning.
        opened = os.dup(descriptor)
    else:
        # If nobody reads a pipe, this fails at once instead of waiting for ever.
        try:
            opened = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            raise OSError(f"{path}: nobody reads from it; start its reader first.") from error
        os.set_blocking(opened, True)
    try:
        _write_pieces(opened, pieces)
    finally:
        os.close(opened)


def _write_pieces(descriptor: int, pieces: Iterable[bytes | memoryview]) -> None:
    for piece in pieces:
        view = memoryview(piece)
        left = view.cast("B") if view.nbytes else view
        while left.nbytes:
            left = left[os.write(descriptor, left) :]
        # Otherwise they would be kept while the next one is made.
        del piece, view, left


def _link_new(made: Path, target: Path, path: Path) -> None:
    """Move without replacing. Unlike a rename, a hard link fails if another process was faster."""
    try:
        target.hardlink_to(made)
    except FileExistsError:
        raise FileExistsError(_exists(path)) from None
    except OSError:
        # The file system has no hard links.
        made.replace(target)


def _locked_folder(target: Path) -> tuple[Path, int | None]:
    """A new hidden folder and the lock on it. The lock is None if the file system has no locks."""
    while True:
        folder = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
        folder.mkdir()
        try:
            lock = _lock(folder)
        except (BlockingIOError, FileNotFoundError):
            # Another process removed it as a leftover.
            continue
        if folder.exists():
            return folder, lock
        if lock is not None:
            os.close(lock)


def _remove_abandoned(target: Path) -> None:
    """Remove the hidden folders of this target that no process holds."""
    with suppress(OSError):
        for folder in target.parent.iterdir():
            name = folder.name.removeprefix(f".{target.name}.").removesuffix(".tmp")
            if folder.name != f".{target.name}.{name}.tmp" or len(name) != _DIGITS or not folder.is_dir():
                continue
            with suppress(OSError):
                lock = _lock(folder)
                if lock is not None:
                    if (folder / _BEFORE).exists() and not target.exists():
                        (folder / _BEFORE).rename(target)
                    shutil.rmtree(folder, ignore_errors=True)
                    os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder. Returns None if the file system has no locks.

    Raises:
        BlockingIOError: if another process holds it.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(opened)
        raise
    except OSError:
        os.close(opened)
        return None
    return opened


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step. Returns False if the system cannot.

    Source: renameat2(2) of Linux, in glibc since 2.28.
    """
    if not sys.platform.startswith("linux"):
        return False
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    if call is None:
        return False
    here = ctypes.c_int(_AT_FDCWD)
    names = (here, os.fsencode(one), here, os.fsencode(other))
    return bool(call(*names, ctypes.c_uint(_RENAME_EXCHANGE)) == 0)


_MOST_LINKS = 40
_STANDARD_OUTPUT = 1
_DIGITS = 12
_BEFORE = ".before"
# Values from <fcntl.h> and <linux/fs.h>.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
