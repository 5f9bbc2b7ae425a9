"""`.npz`: a zip archive of numpy arrays; those that are no numbers are left out, and none is unpickled."""

import json
import tokenize
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from selfattn_core.porting.errors import PortError
from selfattn_core.porting.readers.archive import Archive, Member
from selfattn_core.porting.readers.binary import bits, read_array, stored_bytes
from selfattn_core.porting.readers.limits import checked_shape
from selfattn_core.porting.readers.source import Source
from selfattn_core.porting.readers.tensors import Entry, TensorInfo, Tensors

__all__ = ["METADATA", "open_npz"]

# A member that numpy lists too, and gives as bytes.
METADATA = "__metadata__.json"
_LONGEST_HEADER = 2**16


def open_npz(path: Path) -> Tensors:
    """The arrays of an `.npz` file; a member that is no array of numbers is left out, unread.

    Args:
        path: of the file.

    Raises:
        PortError: if the archive is damaged or made to deceive, an array is of another size than its header says, or every
            array is of Python objects or of a dtype that is no number.
    """
    archive = Archive(Source(path))
    try:
        names = [name for name in archive.members if name.endswith(".npy")]
        entries, left_out, problems = {}, {}, []
        for name in names:
            try:
                entries[name.removesuffix(".npy")] = _entry(archive, name)
            except _NoNumbersError as error:
                left_out[name.removesuffix(".npy")] = str(error)
            except PortError as error:
                problems.append(str(error))
        if not entries:
            problems += left_out.values()
        if problems:
            raise PortError(f"{path}: arrays cannot be read:\n" + "\n".join(f"  {p}" for p in problems[:50]))
        return Tensors(path, "npz", entries, _metadata(archive), archive.close, left_out)
    except BaseException:
        archive.close()
        raise


class _NoNumbersError(PortError):
    pass


def _entry(archive: Archive, name: str) -> Entry:
    size = archive.members[name].file_size
    start = bytearray(min(size, _LONGEST_HEADER))
    member = Member(archive, name)
    try:
        member.read_into(memoryview(start))
    finally:
        member.close()
    header = BytesIO(start)
    try:
        version = npy.read_magic(header)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, fortran, dtype = read(header)
    # What numpy's parser of the header, which is Python's own, raises on nonsense.
    except (
        ValueError,
        KeyError,
        TypeError,
        SyntaxError,
        RecursionError,
        MemoryError,
        tokenize.TokenError,
        # Where warnings are errors: numpy warns of a header that Python 2 wrote.
        UserWarning,
    ) as error:
        raise PortError(f"{name}: its header is not numpy's ({str(error)[:200]})") from None
    if dtype.hasobject:
        raise _NoNumbersError(
            f"{name}: holds Python objects, which only unpickling could read; nothing is executed"
        )
    narrow = _narrow(dtype)
    if narrow is None:
        raise _NoNumbersError(f"{name}: has the dtype {str(dtype)[:60]}; expected numbers")
    info = TensorInfo(checked_shape(name, shape), narrow)
    if header.tell() + stored_bytes(info) != size:
        raise PortError(
            f"{name}: {dtype} {info.shape} needs {stored_bytes(info)} bytes, the file has {size - header.tell()}"
        )
    swapped = not dtype.isnative

    def load() -> NDArray[np.generic]:
        member = Member(archive, name)
        try:
            member.read_into(memoryview(bytearray(header.tell())))
            stored = TensorInfo(info.shape[::-1] if fortran else info.shape, info.dtype)
            array = read_array(f"{archive.source.path}: {name}", stored, member.read_into)
            member.finish()
        finally:
            member.close()
        array = array.byteswap() if swapped else array
        return array.T if fortran else array

    return Entry(info, load)


def _narrow(dtype: np.dtype[np.generic]) -> str | None:
    """The name of a dtype of ours; bfloat16 is saved by numpy as two bytes of nothing."""
    if dtype.fields is not None or dtype.subdtype is not None:
        return None
    if dtype.kind == "V" and dtype.itemsize == 2:
        return "bfloat16"
    return dtype.name if dtype.kind in "biufc" and bits(dtype.name) else None


def _metadata(archive: Archive) -> dict[str, str]:
    if METADATA not in archive.members:
        return {}
    try:
        content = json.loads(archive.read(METADATA))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise PortError(f"{archive.source.path}: {METADATA} is not a JSON object of strings.")
    return content
