"""Reads HDF5 as far as Keras uses it, without the HDF5 library: groups, plain arrays of numbers and attributes of text.

Why not h5py: a damaged file can make that library loop or crash, which no Python code can catch, and it follows links to other
files. Here every structure is within the file, and none is visited twice. Content that Keras never writes (links, arrays that
are in pieces, compressed or in other files) is refused by name. The price is small. Measured with h5py 3.14 on a
file of 400 MiB of which one array of 4 MiB is read: h5py takes 17 MiB and 0.01 s, this reader 19 MiB and 0.07 s.

Source: the HDF5 File Format Specification, versions 2.0 and 3.0, whose names for structures and fields are used here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats.numbers import bits, read_array, stored_bytes
from selfattn_core.porting.formats.tensors import TensorInfo
from selfattn_core.porting.formats.untrusted.file import Source
from selfattn_core.porting.formats.untrusted.limits import MAX_DEPTH, MAX_TENSORS, checked_shape

__all__ = ["SIGNATURE", "Dataset", "Hdf5"]

SIGNATURE = b"\x89HDF\r\n\x1a\n"
_UNDEFINED = 2**64 - 1
_LONGEST_TEXT = 2**20
_SIZES = {(0, 1): "int8", (0, 2): "int16", (0, 4): "int32", (0, 8): "int64"} | {
    (1, 2): "float16",
    (1, 4): "float32",
    (1, 8): "float64",
}
# Exponent and mantissa bits of numpy's floats.
_FLOATS = {2: (5, 10), 4: (8, 23), 8: (11, 52)}
Keys = tuple[str, ...]


@dataclass(frozen=True)
class Dataset:
    """The type and place of an array.

    Args:
        info: shape and dtype.
        place: the place of its first byte in the file.
        swapped: whether it is big-endian.
    """

    info: TensorInfo
    place: int
    swapped: bool


@dataclass
class _Header:
    """The messages of one object, by type."""

    messages: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


class Hdf5:
    """The content of a file.

    Args:
        source: the file.
        begin: the place in the file where HDF5 begins.
        size: the number of its bytes.

    Raises:
        PortError: if it is truncated or damaged, or has a form that Keras does not write.
    """

    def __init__(self, source: Source, begin: int, size: int) -> None:
        self.source, self.begin, self.size = source, begin, size
        self.path: Path = source.path
        self.problems: list[str] = []
        self.datasets: dict[Keys, Dataset] = {}
        self.texts: dict[Keys, dict[str, str]] = {}
        self._visited: set[int] = set()
        self._headers = 0
        self._group(self._superblock(), ())

    def read(self, name: str, dataset: Dataset) -> NDArray[Any]:
        """The numbers of an array, in the machine's byte order."""
        self.source.file.seek(self.begin + dataset.place)
        array = read_array(f"{self.path}: {name}", dataset.info, self.source.read_into)
        return array.byteswap() if dataset.swapped else array

    def _bytes(self, place: int, count: int) -> bytes:
        if place < 0 or count < 0 or place + count > self.size:
            raise PortError(
                f"{self.path}: is truncated or damaged: bytes {place} to {place + count} are needed, it has {self.size}."
            )
        return self.source.bytes_at(self.begin + place, count)

    def _number(self, place: int, width: int = 8) -> int:
        return int.from_bytes(self._bytes(place, width), "little")

    def _damaged(self, what: str) -> PortError:
        return PortError(f"{self.path}: is a damaged HDF5 file: {what}.")

    def _once(self, place: int, where: Keys = ()) -> None:
        if place in self._visited or len(self._visited) > 4 * MAX_TENSORS:
            raise PortError(
                f"{self.path}: /{'/'.join(where)} is reached twice: the file is damaged, or it was made so that reading does not end."
            )
        self._visited.add(place)

    def _superblock(self) -> int:
        """The address of the root group."""
        if self.size < 48 or self._bytes(0, 8) != SIGNATURE:
            raise PortError(f"{self.path}: is truncated, or is not an HDF5 file.")
        version = self._number(8, 1)
        old = version in (0, 1)
        widths = self._bytes(13 if old else 9, 2)
        if version > 3 or widths != b"\x08\x08":
            raise PortError(
                f"{self.path}: is HDF5 of a kind that Keras does not write. Load it with Keras and save it again."
            )
        first = (24 + 4 * version) if old else 12
        base, end = self._number(first), self._number(first + 16)
        if base:
            raise PortError(f"{self.path}: does not begin with HDF5. Load it with Keras and save it again.")
        if end > self.size:
            raise PortError(f"{self.path}: is truncated: it should have {end} bytes, but it has {self.size}.")
        return self._number(first + 40) if old else self._number(36)

    # Objects

    def _header(self, address: int, where: Keys) -> _Header:
        self._once(address, where)
        header = _Header()
        start = self._bytes(address, 6)
        if start[:4] == b"OHDR":
            blocks = [self._second(address, start)]
            new, ordered = True, bool(start[5] & 4)
        elif start[0] == 1:
            blocks = [(address + 16, self._number(address + 8, 4))]
            new = ordered = False
        else:
            raise self._damaged(f"/{'/'.join(where)} is not an object")
        while blocks:
            place, length = blocks.pop(0)
            for kind, at, size in self._messages(place, length, new, ordered):
                if kind == 0x10:
                    address, length = self._number(at), self._number(at + 8)
                    self._once(address, where)
                    blocks.append((address + 4, length - 8) if new else (address, length))
                elif kind == 0x0C:
                    self._attribute(header, at, size)
                header.messages.setdefault(kind, []).append((at, size))
        return header

    def _second(self, address: int, start: bytes) -> tuple[int, int]:
        """The place and the size of the messages of a header of version 2."""
        flags = start[5]
        place = address + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        return place + width, self._number(place, width)

    def _messages(self, place: int, length: int, new: bool, ordered: bool) -> Iterator[tuple[int, int, int]]:
        end = place + length
        self._bytes(place, max(length, 0))
        head = 4 + 2 * ordered if new else 8
        while place + head <= end:
            self._headers += 1
            if self._headers > 20 * MAX_TENSORS:
                raise self._damaged("it has more messages than any checkpoint")
            kind = self._number(place, 1 if new else 2)
            size = self._number(place + (1 if new else 2), 2)
            flags = self._number(place + (3 if new else 4), 1)
            if place + head + size > end:
                raise self._damaged(f"a message at byte {place} does not end")
            if flags & 2 and kind in (1, 3, 8):
                raise PortError(
                    f"{self.path}: shares descriptions between arrays, which Keras does not; save it with Keras."
                )
            yield kind, place + head, size
            place += head + size

    def _attribute(self, header: _Header, place: int, size: int) -> None:
        """Keep an attribute if it is one text."""
        content = self._bytes(place, size)
        version = content[0] if content else 0
        if version not in (1, 2, 3) or size < 9:
            return
        sizes = [int.from_bytes(content[at : at + 2], "little") for at in (2, 4, 6)]
        at = 9 if version == 3 else 8
        parts = []
        for length in sizes:
            parts.append(content[at : at + length])
            at += (length + 7) // 8 * 8 if version == 1 else length
        name, kind, space = parts
        if len(kind) < 8 or not _is_scalar(space):
            return
        value = content[at:]
        if kind[0] & 15 == 9 and kind[1] & 15 == 1 and len(value) >= 16:
            value = self._heap_object(
                int.from_bytes(value[4:12], "little"), int.from_bytes(value[12:16], "little")
            )
        elif kind[0] & 15 != 3:
            return
        else:
            value = value[: int.from_bytes(kind[4:8], "little")]
        header.texts[_text(name)] = _text(value)

    def _heap_object(self, address: int, index: int) -> bytes:
        """A text of variable length, which is in a collection elsewhere."""
        if self._bytes(address, 4) != b"GCOL":
            raise self._damaged("a text is not where it should be")
        end = address + self._number(address + 8)
        place = address + 16
        while place + 16 <= min(end, self.size):
            number, size = self._number(place, 2), self._number(place + 8)
            if number == index:
                return self._bytes(place + 16, size) if size <= _LONGEST_TEXT else b""
            if not number:
                break
            place += 16 + (size + 7) // 8 * 8
        return b""

    # Groups

    def _group(self, address: int, keys: Keys) -> None:
        if len(keys) > MAX_DEPTH:
            raise PortError(f"{self.path}: /{'/'.join(keys)} is nested deeper than any checkpoint.")
        header = self._header(address, keys)
        if header.texts:
            self.texts[keys] = header.texts
        if 8 in header.messages:
            self._dataset(header, keys)
            return
        for name, child in self._links(header, keys):
            self._group(child, (*keys, name))

    def _links(self, header: _Header, keys: Keys) -> Iterator[tuple[str, int]]:
        """The names in a group, and the addresses of their objects. Other links are problems."""
        for place, _ in header.messages.get(0x02, []):
            flags = self._number(place + 1, 1)
            if self._number(place + 2 + (8 if flags & 1 else 0)) != _UNDEFINED:
                raise PortError(
                    f"{self.path}: /{'/'.join(keys)} is a group of the newest form of HDF5, which Keras does not write. Load "
                    "the file with Keras and save it again."
                )
        for place, size in header.messages.get(0x06, []):
            yield from self._link(place, size, keys)
        for place, _ in header.messages.get(0x11, []):
            tree, heap = self._number(place), self._number(place + 8)
            if self._bytes(heap, 4) != b"HEAP":
                raise self._damaged(f"/{'/'.join(keys)} has no names")
            names, length = self._number(heap + 24), self._number(heap + 8)
            segment = self._bytes(names, length)
            for offset, address, cached in self._symbols(tree, keys):
                name = _text(segment[offset : offset + _LONGEST_TEXT].partition(b"\0")[0])
                if cached == 2:
                    self._refuse_link(keys, name, "a soft link")
                else:
                    yield name, address

    def _symbols(self, address: int, keys: Keys) -> Iterator[tuple[int, int, int]]:
        """Rows of a group's table: offset of the name, address of the object, kind of the row."""
        nodes = [address]
        while nodes:
            node = nodes.pop(0)
            self._once(node, keys)
            start = self._bytes(node, 8)
            count = int.from_bytes(start[6:8], "little")
            if start[:4] == b"TREE" and start[4] == 0:
                nodes += [self._number(node + 32 + 16 * index) for index in range(count)]
            elif start[:4] == b"SNOD":
                for index in range(count):
                    row = self._bytes(node + 8 + 40 * index, 40)
                    offset, target, cached = (
                        int.from_bytes(row[a:b], "little") for a, b in ((0, 8), (8, 16), (16, 20))
                    )
                    yield offset, target, cached
            else:
                raise self._damaged(f"the table of /{'/'.join(keys)} is broken")

    def _link(self, place: int, size: int, keys: Keys) -> Iterator[tuple[str, int]]:
        content = self._bytes(place, size)
        flags = content[1] if size > 1 else 0
        at = 2
        kind = 0
        if flags & 8:
            kind, at = content[at], at + 1
        at += (8 if flags & 4 else 0) + (1 if flags & 16 else 0)
        width = 1 << (flags & 3)
        length = int.from_bytes(content[at : at + width], "little")
        name = content[at + width : at + width + length]
        at += width + length
        if kind == 0 and at + 8 <= size:
            yield _text(name), int.from_bytes(content[at : at + 8], "little")
        else:
            what = {1: "a soft link", 64: "an external link, to another file"}.get(kind, "an unknown link")
            self._refuse_link(keys, _text(name), what)

    def _refuse_link(self, keys: Keys, name: str, what: str) -> None:
        self.problems.append(f"{'/'.join((*keys, name))}: is {what}; links are not followed")

    # Arrays

    def _dataset(self, header: _Header, keys: Keys) -> None:
        where = "/".join(keys)
        try:
            self.datasets[keys] = self._checked(header, where)
        except PortError as error:
            self.problems.append(str(error))

    def _checked(self, header: _Header, where: str) -> Dataset:
        places = {kind: rows[0] for kind, rows in header.messages.items()}
        if 1 not in places or 3 not in places:
            raise PortError(f"{where}: has no shape or no dtype; the file is damaged")
        shape = self._shape(where, *places[1])
        dtype, swapped = self._dtype(where, *places[3], header.texts.get("dtype") == "bfloat16")
        info = TensorInfo(shape, dtype)
        needed = stored_bytes(info)
        if 7 in places:
            raise PortError(f"{where}: is in other files, which are not opened")
        place, size = places[8]
        version, kind = self._bytes(place, 2)
        if version not in (3, 4) or kind > 3:
            raise PortError(
                f"{where}: is stored in a way that Keras never does; load it with Keras and save it again"
            )
        if kind == 3:
            raise PortError(f"{where}: is in other files, which are not opened")
        if kind == 2:
            raise PortError(
                f"{where}: is stored in pieces or compressed, which Keras never does, and would expand to {needed} bytes; "
                "save it with Keras"
            )
        if kind == 0:
            begin, held = place + 4, min(self._number(place + 2, 2), size - 4)
        else:
            begin, held = self._number(place + 2), self._number(place + 10)
            if begin == _UNDEFINED and needed:
                raise PortError(f"{where}: {dtype} {shape} needs {needed} bytes, none were ever written")
        if needed and (held < needed or begin + needed > self.size):
            raise PortError(
                f"{where}: {dtype} {shape} needs {needed} bytes, the file holds {max(0, min(held, self.size - begin))}"
            )
        return Dataset(info, begin if needed else 0, swapped)

    def _shape(self, where: str, place: int, size: int) -> tuple[int, ...]:
        content = self._bytes(place, size)
        version, rank = content[0] if content else 0, content[1] if size > 1 else 0
        start = {1: 8, 2: 4}.get(version, size)
        if len(content) < start + 8 * rank or (version == 2 and content[3] == 2):
            raise PortError(f"{where}: has no shape; expected numbers")
        axes = [
            int.from_bytes(content[start + 8 * axis : start + 8 * axis + 8], "little") for axis in range(rank)
        ]
        return checked_shape(where, axes)

    def _dtype(self, where: str, place: int, size: int, bfloat16: bool) -> tuple[str, bool]:
        content = self._bytes(place, size)
        kind = content[0] & 15 if size >= 8 else -1
        width = int.from_bytes(content[4:8], "little")
        if bfloat16 and width == 2 and kind in (1, 5):
            return "bfloat16", False
        name = _SIZES.get((kind, width))
        flags = content[1] if size > 1 else 0
        if kind == 0 and name and not flags & 8:
            name = f"u{name}"
        if kind == 1 and name and (size < 20 or (content[13], content[15]) != _FLOATS[width]):
            name = None
        if name is None or (kind == 1 and flags & 64) or bits(name) is None:
            raise PortError(f"{where}: holds no plain numbers; expected numbers, as Keras stores them")
        return name, bool(flags & 1)


def _is_scalar(space: bytes) -> bool:
    return (
        len(space) > 1
        and space[0] in (1, 2)
        and space[1] == 0
        and not (space[0] == 2 and space[3:4] == b"\2")
    )


def _text(content: bytes) -> str:
    return content.partition(b"\0")[0].decode("utf-8", "replace")
