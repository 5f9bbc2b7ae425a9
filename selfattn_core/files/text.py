"""Reading a small text file up to a limit, so that a wrong name cannot fill the memory."""

from pathlib import Path

__all__ = ["read_text"]


def read_text(path: Path, *, most: int) -> str:
    """The text of a file in UTF-8, with or without a byte-order mark.

    Args:
        path: a file, or a pipe such as a shell's process substitution.
        most: the most bytes that the file may have. At most one further byte is read.

    Raises:
        OSError: if the file does not exist, is a folder, or cannot be read.
        ValueError: if it has more bytes, or is not UTF-8 text.

    Example:
        >>> import os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "mine.toml"
        ...     _ = path.write_text('title = "mine"')
        ...     read_text(path, most=100)
        'title = "mine"'
        >>> read_text(Path(os.devnull), most=100)
        ''
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, where a file is expected.")
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file.") from None
    if len(content) > most:
        raise ValueError(f"{path}: has more than {most} bytes, the most that such a file may have.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); save it in that encoding."
        ) from error
