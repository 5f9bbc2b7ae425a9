"""Reads and writes `.npz`, a zip archive of numpy arrays. Arrays that are not numeric are left out, and nothing is unpickled."""

import io
import json
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from selfattn_core.arrays import contiguous
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats.format import Format
from selfattn_core.porting.formats.npy import LONGEST_HEADER, dtype_name, npy_header
from selfattn_core.porting.formats.numbers import read_array, stored_bytes
from selfattn_core.porting.formats.tensors import Array, Entry, TensorInfo, Tensors
from selfattn_core.porting.formats.untrusted.file import Source
from selfattn_core.porting.formats.untrusted.zip import Archive, Member

__all__ = ["FORMATS", "open_npz"]

# numpy lists this member too, and returns it as bytes.
_METADATA = "__metadata__.json"


def open_npz(path: Path) -> Tensors:
    """List the arrays of an `.npz` file. A member that is not a numeric array is left out.

    Args:
        path: the path of the file.

    Raises:
        PortError: if the archive is damaged or deceptive, if the size of an array differs from its header, or if no array is
            numeric.
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
    start = bytearray(min(size, LONGEST_HEADER))
    member = Member(archive, name)
    try:
        member.read_into(memoryview(start))
    finally:
        member.close()
    header = npy_header(name, bytes(start))
    if header.dtype.hasobject:
        raise _NoNumbersError(
            f"{name}: holds Python objects, which only unpickling could read, and nothing is executed. If it is a dictionary and "
            f"you trust it, make a file of arrays: numpy.savez(NEW, **numpy.load(PATH, allow_pickle=True)"
            f"[{name.removesuffix('.npy')!r}].item())"
        )
    narrow = dtype_name(header.dtype)
    if narrow is None:
        raise _NoNumbersError(f"{name}: has the dtype {str(header.dtype)[:60]}; expected numbers")
    info = TensorInfo(header.shape, narrow)
    if header.size + stored_bytes(info) != size:
        raise PortError(
            f"{name}: {header.dtype} {info.shape} needs {stored_bytes(info)} bytes, but the file has {size - header.size}"
        )
    swapped, fortran = not header.dtype.isnative, header.fortran

    def load() -> NDArray[np.generic]:
        member = Member(archive, name)
        try:
            member.read_into(memoryview(bytearray(header.size)))
            stored = TensorInfo(info.shape[::-1] if fortran else info.shape, info.dtype)
            array = read_array(f"{archive.source.path}: {name}", stored, member.read_into)
            member.finish()
        finally:
            member.close()
        array = array.byteswap() if swapped else array
        return array.T if fortran else array

    return Entry(info, load)


def _metadata(archive: Archive) -> dict[str, str]:
    if _METADATA not in archive.members:
        return {}
    try:
        content = json.loads(archive.read(_METADATA))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise PortError(f"{archive.source.path}: {_METADATA} is not a JSON object of strings.")
    return content


def _content(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, array in tensors.items():
            # The date is fixed, so that equal tensors give equal files.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                npy_format.write_array(member, contiguous(array), allow_pickle=False)
        if metadata:
            archive.writestr(zipfile.ZipInfo(_METADATA), json.dumps(dict(metadata)))
    return content.getvalue()


def _is_archive(names: Collection[str]) -> bool:
    return not names or any(name.endswith(".npy") for name in names)


FORMATS = (Format("npz", open_npz, ".npz", is_archive=_is_archive, file=_content),)
