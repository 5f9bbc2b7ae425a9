"""Reads the checkpoints of `tf.train.Saver` and `tf.train.Checkpoint` without TensorFlow.

A checkpoint is an index, which is a sorted table of protocol buffers with checksums, and data files beside it.

Source: tensorflow/core/util/tensor_bundle, tensorflow/core/protobuf/tensor_bundle.proto, and the table format of LevelDB.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats.format import Format
from selfattn_core.porting.formats.numbers import read_array, stored_bytes
from selfattn_core.porting.formats.tensors import Entry, TensorInfo, Tensors
from selfattn_core.porting.formats.untrusted.crc32c import crc32c, masked
from selfattn_core.porting.formats.untrusted.file import Source
from selfattn_core.porting.formats.untrusted.limits import MAX_HEADER, MAX_TENSORS, checked_shape
from selfattn_core.porting.formats.untrusted.object_graph import names_of
from selfattn_core.porting.formats.untrusted.protobuf import message, number, varint

__all__ = ["FORMATS", "checkpoint_prefix", "open_tensorflow"]

_MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
_FOOTER = 48
_DTYPES = {
    1: "float32",
    2: "float64",
    3: "int32",
    4: "uint8",
    5: "int16",
    6: "int8",
    8: "complex64",
    9: "int64",
    10: "bool",
    14: "bfloat16",
    17: "uint16",
    18: "complex128",
    19: "float16",
    22: "uint32",
    23: "uint64",
    24: "float8_e5m2",
    25: "float8_e4m3fn",
}
_STRING = 7
_LONGEST_KEY = 2**14
_OBJECT = "/.ATTRIBUTES/VARIABLE_VALUE"
_GRAPH = b"_CHECKPOINTABLE_OBJECT_GRAPH"


def checkpoint_prefix(path: Path) -> Path | None:
    """The common beginning of a checkpoint's file names, or None if there is no checkpoint.

    Args:
        path: that beginning, the index, a data file, or the folder of a checkpoint or of a SavedModel.

    Raises:
        PortError: if a folder holds several checkpoints and does not record which one is the latest.

    Example:
        >>> checkpoint_prefix(Path("there-is-no-such-checkpoint")) is None
        True
    """
    if path.is_dir():
        return _prefix_in(path)
    name = re.sub(r"\.(index|meta|data-\d{5}-of-\d{5})$", "", path.name)
    prefix = path.with_name(name) if name else path
    return prefix if _beside(prefix, ".index").is_file() else None


def open_tensorflow(path: Path) -> Tensors:
    """List the variables of a checkpoint. Variables of strings are left out.

    Args:
        path: as in `checkpoint_prefix`.

    Raises:
        PortError: if the index or a data file is missing, truncated or damaged.
    """
    prefix = checkpoint_prefix(path)
    if prefix is None:
        raise PortError(
            f"{path}: is not a checkpoint of TensorFlow. Expected {path.name}.index beside its data files."
        )
    rows = list(_index(_beside(prefix, ".index")))
    if not rows or rows[0][0]:
        raise PortError(f"{prefix}.index: is damaged: its header is missing.")
    header = message(f"{prefix}.index", rows[0][1])
    shards = number(f"{prefix}.index", header, 1, 1)
    if number(f"{prefix}.index", header, 2, 0):
        raise PortError(
            f"{prefix}: was written on a big-endian machine. Load it with TensorFlow and save it again."
        )
    sources: dict[int, Source] = {}

    def close() -> None:
        for source in sources.values():
            source.close()

    try:
        entries: dict[str, Entry] = {}
        problems = []
        names = names_of(str(prefix), _graph(prefix, dict(rows), shards, sources))
        for key, value in rows[1:]:
            # Keys of slices of a partitioned variable are binary.
            if key[:1] == b"\0":
                continue
            stored = key.decode("utf-8", "replace")
            name = names.get(stored, stored.removesuffix(_OBJECT))
            try:
                entry = _entry(prefix, name, message(f"{prefix}: {name}", value), shards, sources)
            except PortError as error:
                problems.append(str(error))
                continue
            if name in entries:
                problems.append(f"{name}: is there twice, so it is unclear which one counts")
            elif entry is not None:
                entries[name] = entry
        if problems:
            raise PortError(
                f"{prefix}: variables cannot be read:\n" + "\n".join(f"  {line}" for line in problems[:50])
            )
        return Tensors(prefix, "tensorflow", entries, {}, close)
    except BaseException:
        close()
        raise


def _beside(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _prefix_in(folder: Path) -> Path | None:
    if (folder / "variables" / "variables.index").is_file():
        return folder / "variables" / "variables"
    found = sorted(path.with_suffix("") for path in folder.glob("*.index"))
    listing = folder / "checkpoint"
    if listing.is_file() and listing.stat().st_size < MAX_HEADER:
        line = re.search(rb'^model_checkpoint_path: "([^"\n]*)"', listing.read_bytes(), re.MULTILINE)
        if line:
            # The folder may have been moved, and the list must not point outside it. So only the name counts.
            named = folder / line[1].decode("utf-8", "replace").rpartition("/")[2]
            if named in found:
                return named
    if len(found) > 1:
        raise PortError(
            f"{folder}: holds {len(found)} checkpoints, name one: {', '.join(str(path) for path in found[:10])}."
        )
    return found[0] if found else None


def _graph(prefix: Path, rows: dict[bytes, bytes], shards: int, sources: dict[int, Source]) -> bytes:
    """The description of objects that `tf.train.Checkpoint` stores as a text tensor. Empty if there is none."""
    if _GRAPH not in rows:
        return b""
    where = f"{prefix}: {_GRAPH.decode()}"
    fields = message(where, rows[_GRAPH])
    size = number(where, fields, 5, 0)
    if number(where, fields, 1, 0) != _STRING or size > MAX_HEADER:
        raise PortError(f"{where}: is no text, or has {size} bytes; at most {MAX_HEADER} are read")
    source = _data_file(prefix, where, number(where, fields, 3, 0), shards, sources)
    content = source.bytes_at(number(where, fields, 4, 0), size)
    length, place = varint(where, content, 0)
    # A checksum of four bytes is between the length and the text.
    if place + 4 + length != size:
        raise PortError(f"{where}: is damaged: it should have {length} bytes")
    return content[place + 4 :]


def _data_file(prefix: Path, name: str, shard: int, shards: int, sources: dict[int, Source]) -> Source:
    if shard >= shards or shards > 99_999:
        raise PortError(f"{name}: is in data file {shard} of {shards}")
    if shard not in sources:
        sources[shard] = Source(_beside(prefix, f".data-{shard:05d}-of-{shards:05d}"))
    return sources[shard]


def _entry(
    prefix: Path, name: str, fields: dict[int, list[int | bytes]], shards: int, sources: dict[int, Source]
) -> Entry | None:
    kind = number(name, fields, 1, 0)
    if kind == _STRING:
        return None
    if kind not in _DTYPES:
        raise PortError(f"{name}: has the dtype number {kind}, which cannot be read")
    if 7 in fields:
        raise PortError(f"{name}: is a partitioned variable; load it with TensorFlow and save it whole")
    shapes = [message(name, shape) for shape in fields.get(2, [])]
    # Protocol buffers omit zeros.
    axes = [number(name, message(name, axis), 1, 0) for shape in shapes for axis in shape.get(2, [])]
    info = TensorInfo(checked_shape(name, axes), _DTYPES[kind])
    shard, place = number(name, fields, 3, 0), number(name, fields, 4, 0)
    size, checksum = number(name, fields, 5, 0), number(name, fields, 6, 0)
    if size != stored_bytes(info):
        raise PortError(
            f"{name}: {info.dtype} {info.shape} needs {stored_bytes(info)} bytes, the index says {size}"
        )
    source = _data_file(prefix, name, shard, shards, sources)
    if place + size > source.size:
        raise PortError(
            f"{name}: ends at byte {place + size} of {source.path.name}, which has {source.size}: it is truncated"
        )

    def read() -> NDArray[Any]:
        source.file.seek(place)
        crc = _Checked(source)
        array = read_array(f"{prefix}: {name}", info, crc.read_into)
        if masked(crc.value()) != checksum:
            raise PortError(
                f"{prefix}: {name} is damaged: its checksum differs; copy or download the file again."
            )
        return array

    return Entry(info, read)


class _Checked:
    """Reads a tensor and keeps the bytes that the checksum needs: at most one tensor, and none beside the array itself."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._pieces: list[memoryview] = []

    def read_into(self, buffer: memoryview) -> None:
        self._source.read_into(buffer)
        self._pieces.append(buffer)

    def value(self) -> int:
        whole = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        return crc32c(whole)


def _index(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of the table, in order."""
    source = Source(path)
    try:
        if source.size > MAX_HEADER:
            raise PortError(f"{path}: has {source.size} bytes; at most {MAX_HEADER} are read.")
        content = source.bytes_at(0, source.size)
    finally:
        source.close()
    if len(content) < _FOOTER or content[-8:] != _MAGIC:
        raise PortError(f"{path}: is truncated, or is not an index of a checkpoint.")
    footer = content[-_FOOTER:]
    _, place = varint(path, footer, 0)
    _, place = varint(path, footer, place)
    offset, place = varint(path, footer, place)
    size, _ = varint(path, footer, place)
    last = None
    count = 0
    for _, handle in _block(path, content, offset, size):
        begin, place = varint(path, handle, 0)
        length, _ = varint(path, handle, place)
        for key, value in _block(path, content, begin, length):
            count += 1
            if (last is not None and key <= last) or count > MAX_TENSORS:
                raise PortError(
                    f"{path}: is damaged: its keys are not in order, or it has the key {key[:80]!r} twice."
                )
            last = key
            yield key, value


def _block(path: Path, content: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    if offset + size + 5 > len(content):
        raise PortError(f"{path}: is truncated or damaged: a block is outside the file.")
    block = content[offset : offset + size]
    kind = content[offset + size]
    stored = int.from_bytes(content[offset + size + 1 : offset + size + 5], "little")
    if masked(crc32c(content[offset : offset + size + 1])) != stored:
        raise PortError(f"{path}: is damaged: the checksum of a block differs; copy or download it again.")
    if kind:
        raise PortError(f"{path}: is compressed. Load it with TensorFlow and save it again.")
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 - 4 * restarts
    place, key = 0, b""
    while place < end:
        shared, place = varint(path, block, place)
        fresh, place = varint(path, block, place)
        length, place = varint(path, block, place)
        if shared > len(key) or place + fresh + length > end or shared + fresh > _LONGEST_KEY:
            raise PortError(f"{path}: is damaged: a row is outside its block.")
        key = key[:shared] + block[place : place + fresh]
        place += fresh
        yield key, block[place : place + length]
        place += length


FORMATS = (
    Format(
        "tensorflow",
        open_tensorflow,
        "a checkpoint of TensorFlow",
        is_at=lambda path: checkpoint_prefix(path) is not None,
    ),
)
