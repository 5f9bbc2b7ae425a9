"""Reading the feature map of one image from an `.npy` or `.npz` file. The header is checked before memory is allocated."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats.npy import LONGEST_HEADER, dtype_name, npy_header
from selfattn_core.porting.formats.npz import open_npz
from selfattn_core.porting.formats.numbers import decode

__all__ = ["LARGEST_ARRAY", "LARGEST_GRID", "check_is_file", "read_features"]


LARGEST_GRID = 2**20
"""The most positions of a feature map, 1024×1024."""

LARGEST_ARRAY = 2**30
"""The most numbers of an array that is unpacked, 4 GiB in float32."""

_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class _Stored:
    """An array of a file, not read yet.

    Args:
        shape: stored shape.
        dtype: stored dtype.
        read: function that returns one sample of a batch, or for None the whole array.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[int | None], Array]


def read_features(
    path: Path,
    config: SelfAttentionConfig,
    *,
    array: str | None = None,
    sample: int | None = None,
    layout: str = "channels_last",
) -> Array:
    """The input of the attention layer for one image, (H, W, C).

    Args:
        path: an .npy file, of which only the sample is read, or an .npz file. Nothing is unpickled.
        config: config of the layer, which contains C.
        array: name of the array in an .npz file with several.
        sample: number of the sample in a batch of several.
        layout: layout of the file, "channels_last" or "channels_first", with or without a batch axis.

    Returns:
        A new array in the file's dtype, bfloat16 as float32.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file does not contain such features, is shorter than its header promises, or has more than
            `LARGEST_GRID` positions or `LARGEST_ARRAY` numbers.
    """
    with _opened(path, array) as stored:
        shape = stored.shape
        channel = -1 if layout == "channels_last" else -3
        axes = "(…, H, W, C)" if layout == "channels_last" else "(…, C, H, W)"
        received = f"{path}: got features of shape {shape} and dtype {stored.dtype}; expected {axes}"
        if len(shape) not in (3, 4):
            raise ValueError(f"{received}, with a batch axis or without: its rank is {len(shape)}.")
        if stored.dtype not in _FLOATS:
            raise ValueError(f"{received}, floating point.")
        if shape[channel] != config.channels:
            other = -3 if channel == -1 else -1
            flag = "channels_first" if channel == -1 else "channels_last"
            hint = (
                f"they are {flag}: pass --layout {flag}."
                if shape[other] == config.channels
                else "are they the input of this layer?"
            )
            raise ValueError(f"{received} with C = {config.channels}: {hint}")
        chosen = _chosen(path, shape, sample)
        height, width = shape[-3:-1] if channel == -1 else shape[-2:]
        config.check_input((1, height, width, config.channels), layer=str(path))
        if height * width > LARGEST_GRID:
            raise ValueError(
                f"{path}: holds features of {height}×{width} positions; at most {LARGEST_GRID} are accepted: use the features of "
                "a smaller image, or of a crop."
            )
        try:
            features = np.ascontiguousarray(np.moveaxis(stored.read(chosen), channel, -1))
        except MemoryError:
            raise ValueError(f"{path}: features of shape {shape} do not fit into memory.") from None
    if not np.isfinite(features).all():
        raise ValueError(f"{path}: the features hold NaN or infinity.")
    return features


def check_is_file(path: Path) -> None:
    """Refuse a path that is not an ordinary file.

    Raises:
        OSError: if the path is a folder or does not exist, or if it is a pipe or a device, where reading could block.

    Example:
        >>> check_is_file(Path("there-is-no-such.npy"))
        Traceback (most recent call last):
        ...
        FileNotFoundError: there-is-no-such.npy: no such file.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, where a file is expected.")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file.")
    if not path.is_file():
        raise OSError(f"{path}: is not an ordinary file; copy its content to one.")


def _chosen(path: Path, shape: tuple[int, ...], sample: int | None) -> int | None:
    """The number of the sample to read, or None without a batch axis."""
    if len(shape) == 3:
        if sample is not None:
            raise ValueError(f"{path}: holds one sample of shape {shape}; pass no --sample.")
        return None
    if not shape[0]:
        raise ValueError(f"{path}: holds a batch of no samples.")
    if sample is None and shape[0] != 1:
        raise ValueError(f"{path}: holds a batch of {shape[0]}; pass --sample, 0 to {shape[0] - 1}.")
    chosen = 0 if sample is None else sample
    if not 0 <= chosen < shape[0]:
        raise ValueError(f"{path}: has no sample {chosen}; it holds {shape[0]}, counted from 0.")
    return chosen


@contextmanager
def _opened(path: Path, name: str | None) -> Iterator[_Stored]:
    check_is_file(path)
    with path.open("rb") as file:
        start = file.read(LONGEST_HEADER)
        size = os.fstat(file.fileno()).st_size
    if start.startswith(b"PK"):
        with open_npz(path) as arrays:
            key = _key(path, list(arrays), arrays.left_out, name)
            info = arrays[key]
            if math.prod(info.shape) > LARGEST_ARRAY:
                raise ValueError(
                    f"{path}: the array {key!r} of shape {info.shape} has more than {LARGEST_ARRAY} numbers, too many to "
                    "unpack; save fewer samples, or save an .npy file, of which only one sample is read."
                )

            def unpacked(sample: int | None) -> Array:
                whole = arrays.read(key)
                return whole if sample is None else whole[sample]

            yield _Stored(info.shape, info.dtype, unpacked)
        return
    if name is not None:
        raise ValueError(f"{path}: has no array {name!r}; it holds a single array: pass no --array.")
    yield _single(path, start, size)


def _key(path: Path, names: list[str], left_out: dict[str, str], name: str | None) -> str:
    if name is None and len(names) == 1:
        return names[0]
    if name is None:
        raise ValueError(
            f"{path}: holds {len(names)} arrays; pass --array, one of: {', '.join(names) or 'none'}."
        )
    if name in left_out:
        raise ValueError(f"{path}: {left_out[name]}.")
    if name not in names:
        raise ValueError(f"{path}: has no array {name!r}; it holds the arrays {', '.join(names)}.")
    return name


def _single(path: Path, start: bytes, size: int) -> _Stored:
    try:
        header = npy_header(str(path), start)
    except PortError as error:
        if start.startswith(b"\x93NUMPY"):
            raise ValueError(f"{str(error).removesuffix('.')}.") from None
        raise ValueError(
            f"{path}: cannot be read as .npy or .npz: it is damaged, or has another format; expected an array of numbers, as "
            "numpy.save writes it."
        ) from None
    if header.dtype.hasobject:
        raise ValueError(
            f"{path}: holds Python objects, which are not unpickled; expected an array of numbers, as numpy.save writes "
            "it."
        )
    promised = header.size + math.prod(header.shape) * header.dtype.itemsize
    if promised > size:
        raise ValueError(
            f"{path}: promises an array of shape {header.shape} and dtype {header.dtype}, {promised} bytes with its header, "
            f"and has {size}: it is truncated or damaged."
        )
    dtype = dtype_name(header.dtype) or str(header.dtype)[:60]

    def mapped(sample: int | None) -> Array:
        try:
            whole = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read, or changed while it was read ({error}).") from error
        values = np.array(whole if sample is None else whole[sample], order="C")
        return decode(values.view(np.uint8), dtype) if dtype == "bfloat16" else values

    return _Stored(header.shape, dtype, mapped)
