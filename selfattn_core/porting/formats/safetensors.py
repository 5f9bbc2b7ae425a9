"""Adds `.safetensors` to the formats of checkpoints. `selfattn_core.files.safetensors` implements the format."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from selfattn_core.files.safetensors import DTYPES, SafetensorsError, pieces, read_header
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats.format import Format
from selfattn_core.porting.formats.tensors import Array, Entry, TensorInfo, Tensors
from selfattn_core.porting.formats.untrusted.file import Source

__all__ = ["FORMATS", "open_safetensors"]


def open_safetensors(path: Path) -> Tensors:
    """List the tensors of a `.safetensors` file.

    Args:
        path: the path of the file.

    Raises:
        PortError: with every wrong tensor, if the header is malformed, has a key twice, or does not fit the bytes of the file.
    """
    source = Source(path)
    try:
        header = read_header(source.file)
        entries = {}
        for key, row in header.tensors.items():
            info = TensorInfo(row.shape, DTYPES[row.code])
            entries[key] = Entry(info, lambda k=key, p=row.place, i=info: source.array_at(k, p, i))  # type: ignore[misc]
        return Tensors(path, "safetensors", entries, header.metadata, source.close)
    except SafetensorsError as error:
        source.close()
        raise PortError(f"{path}: {error}") from None
    except BaseException:
        source.close()
        raise


def _content(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The content in pieces, because tensors may be computed at access and may not fit into memory together."""
    try:
        yield from pieces(tensors, metadata)
    except SafetensorsError as error:
        raise PortError(str(error)) from None


def _begins(start: bytes) -> bool:
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**40


FORMATS = (Format("safetensors", open_safetensors, ".safetensors", begins=_begins, file=_content),)
