"""Keras' HDF5 files: `.weights.h5`, the one inside `.keras`, and the older `.h5`.

Keras 3 stores the variables of a layer as `vars/0`, `vars/1` below the path of attributes that leads to it. Here they get
their names back where layer and attribute say what they are, and keep the number where nothing does. The layers of a model
are listed by their class and a counter, and bear their own name as an attribute: that name is used.

Source: keras/src/saving/saving_lib.py and legacy/saving/legacy_h5_format.py for the layout.
"""

import io
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfattn_core.installed import require
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.readers.archive import Archive
from selfattn_core.porting.readers.binary import bits, decode
from selfattn_core.porting.readers.limits import MAX_DEPTH, MAX_EXPANSION, MAX_TENSORS, SMALL, checked_shape
from selfattn_core.porting.readers.source import Source
from selfattn_core.porting.readers.tensors import Entry, TensorInfo, Tensors

__all__ = ["CONTINUED", "open_h5", "open_keras"]

# Between the name of an attribute that is too long for one and the number of the piece.
CONTINUED = " continued "
Keys = tuple[str, ...]

_DAMAGE = (
    OSError,
    KeyError,
    ValueError,
    RuntimeError,
    TypeError,
    AttributeError,
    UnicodeError,
    OverflowError,
)
_LONGEST_TEXT = 2**20
# Attributes of older files that describe the model.
_CONFIGS = {"model_config", "training_config"}
_WEIGHTS = "model.weights.h5"
# deflate, shuffle, fletcher32, szip and lzf's own number; others would load a plug-in, which is code.
_FILTERS = {1, 2, 3, 4, 32000}
# Variables of layers of Keras in the order in which they save them. By the class, in a list of layers.
_VARIABLES = {
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "layer_normalization": ("gamma", "beta"),
    "group_normalization": ("gamma", "beta"),
    "embedding": ("embeddings",),
    "spectral_normalization": ("vector_u",),
}


def open_h5(path: Path) -> Tensors:
    """The variables of a `.weights.h5` or `.h5` file.

    Args:
        path: of the file.

    Raises:
        PortError: if the file is truncated or damaged, a link in it leads elsewhere, a dataset lies outside it, or one
            promises more numbers than the file could hold.
        ModuleNotFoundError: if h5py is not installed.
    """
    source = Source(path)
    try:
        # h5py opens the path by itself: through a Python file it would read more slowly.
        return _open(path, str(path), source.size, {}, source.close)
    except BaseException:
        source.close()
        raise


def open_keras(path: Path) -> Tensors:
    """The variables of a `.keras` archive; nothing of the model that it describes is built.

    Args:
        path: of the file.

    Raises:
        PortError: as `open_h5`, or if the archive is damaged or made to deceive.
        ModuleNotFoundError: if h5py is not installed.
    """
    archive = Archive(Source(path))
    try:
        if _WEIGHTS not in archive.members:
            raise PortError(f"{path}: is a .keras archive without {_WEIGHTS}; save the model as one file.")
        place = archive.place(_WEIGHTS)
        size = archive.members[_WEIGHTS].file_size
        window = io.BufferedReader(_Window(archive.source, place, size))
        return _open(path, window, size, _versions(archive), archive.close)
    except BaseException:
        archive.close()
        raise


class _Window(io.RawIOBase):
    """Part of a file, as a file."""

    def __init__(self, source: Source, place: int, size: int) -> None:
        self._source, self._begin, self._size, self._at = source, place, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        self._source.file.seek(self._begin + self._at)
        read: int = self._source.file.readinto(memoryview(buffer)[:count])  # type: ignore[attr-defined]
        self._at += read
        return read


def _versions(archive: Archive) -> dict[str, str]:
    try:
        content = json.loads(archive.read("metadata.json"))
        return {"keras_version": str(content["keras_version"])}
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}


def _open(path: Path, file: Any, size: int, metadata: dict[str, str], close: Callable[[], object]) -> Tensors:
    require("selfattn_core.porting", ["h5py"], "keras")
    import h5py

    try:
        root = h5py.File(file, "r")
    # What h5py raises on a damaged file, here and below, depends on where the damage is.
    except _DAMAGE as error:
        raise PortError(f"{path}: is truncated, damaged or no HDF5 file ({error}).") from None

    def close_all() -> None:
        root.close()
        close()

    try:
        walk = _Walk(path, size, h5py)
        try:
            walk.group(root, ())
            entries = dict(_named(walk))
        except PortError:
            raise
        except _DAMAGE as error:
            raise PortError(f"{path}: is a damaged HDF5 file ({type(error).__name__}: {error}).") from None
        if walk.problems:
            raise PortError(f"{path}: is not read:\n" + "\n".join(f"  {line}" for line in walk.problems[:50]))
        if not entries:
            raise PortError(f"{path}: holds no variables; expected weights that Keras saved.")
        return Tensors(path, "keras", entries, metadata | _attributes(root), close_all)
    except BaseException:
        root.close()
        raise


class _Walk:
    """Every dataset below a group, reached by hard links only."""

    def __init__(self, path: Path, size: int, h5py: Any) -> None:
        self.path, self.size, self.h5py = path, size, h5py
        self.problems: list[str] = []
        self.datasets: dict[Keys, Entry] = {}
        self.names: dict[Keys, str] = {}
        self._seen: set[int] = set()

    def group(self, group: Any, keys: Keys) -> None:
        """Collect what is below a group.

        Raises:
            PortError: if a group contains itself, or there is more than a checkpoint has.
        """
        address = self.h5py.h5o.get_info(group.id).addr
        if address in self._seen or len(keys) > MAX_DEPTH or len(self.datasets) > MAX_TENSORS:
            raise PortError(
                f"{self.path}: /{'/'.join(keys)} is reached twice, or nested deeper than any checkpoint."
            )
        self._seen.add(address)
        if keys[-1:] == ("vars",):
            name = _text(group, "name")
            if name:
                self.names[keys[:-1]] = name
        for child in group:
            where = "/".join((*keys, child))
            link = group.get(child, getlink=True)
            if not isinstance(link, self.h5py.HardLink):
                kind = "an external link, to another file" if hasattr(link, "filename") else "a soft link"
                self.problems.append(f"{where}: is {kind}; links are not followed")
                continue
            value = group[child]
            if isinstance(value, self.h5py.Group):
                self.group(value, (*keys, child))
            elif isinstance(value, self.h5py.Dataset):
                try:
                    self.datasets[*keys, child] = self.entry(where, value)
                except PortError as error:
                    self.problems.append(str(error))

    def entry(self, where: str, dataset: Any) -> Entry:
        """A dataset, once it is known to lie in the file and to hold what it promises.

        Raises:
            PortError: if it does not.
        """
        shape = checked_shape(where, dataset.shape) if dataset.shape is not None else (-1,)
        dtype = "bfloat16" if _text(dataset, "dtype") == "bfloat16" else dataset.dtype.name
        plain = dataset.dtype.kind in "biufc" or (dtype == "bfloat16" and dataset.dtype.itemsize == 2)
        if shape == (-1,) or not plain or bits(dtype) is None:
            raise PortError(f"{where}: holds {dataset.dtype}; expected numbers")
        plan = dataset.id.get_create_plist()
        if dataset.is_virtual or plan.get_external_count():
            raise PortError(f"{where}: lies in other files, which are not opened")
        filters = {plan.get_filter(index)[0] for index in range(plan.get_nfilters())}
        if filters - _FILTERS:
            raise PortError(
                f"{where}: is compressed by {sorted(filters - _FILTERS)}, a plug-in, which is not loaded"
            )
        promised = math.prod(shape) * dataset.dtype.itemsize
        stored = dataset.id.get_storage_size()
        grown = max(promised, math.prod(dataset.chunks or ()) * dataset.dtype.itemsize)
        if stored > self.size or (dataset.chunks is None and stored < promised):
            raise PortError(
                f"{where}: {dtype} {shape} needs {promised} bytes, the file holds {min(stored, self.size)}"
            )
        if grown > max(SMALL, MAX_EXPANSION * stored) or (promised and not stored):
            raise PortError(f"{where}: would expand from {stored} to {grown} bytes; store it uncompressed")

        def read() -> NDArray[Any]:
            try:
                array: NDArray[Any] = dataset[()]
            except _DAMAGE as error:
                raise PortError(f"{self.path}: {where} is damaged ({error}).") from None
            if dtype == "bfloat16":
                return decode(np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8), dtype)
            return array.astype(array.dtype.newbyteorder("="), copy=False)

        return Entry(TensorInfo(shape, dtype), read)


def _attributes(root: Any) -> dict[str, str]:
    """The texts among the attributes of the file, where our own writer keeps its metadata, long ones in pieces."""
    texts: dict[str, str] = {}
    for name in sorted(set(root.attrs) - _CONFIGS, key=lambda name: (len(name), name)):
        text = _text(root, name)
        if text:
            key = name.partition(CONTINUED)[0]
            texts[key] = texts.get(key, "") + text
    return texts


def _text(item: Any, name: str) -> str:
    """A short attribute of text, or nothing."""
    if name not in item.attrs:
        return ""
    attribute = item.attrs.get_id(name)
    if attribute.shape != () or attribute.get_storage_size() > _LONGEST_TEXT:
        return ""
    value = item.attrs[name]
    return value if isinstance(value, str) else ""


def _named(walk: _Walk) -> Iterator[tuple[str, Entry]]:
    """Names of the variables, by layers and attributes."""
    parents: dict[Keys, dict[str, Entry]] = {}
    for keys, entry in walk.datasets.items():
        parents.setdefault(keys[:-1], {})[keys[-1]] = entry
    groups = {keys[:length] for keys in walk.datasets for length in range(len(keys))}
    own = _own_names(walk)
    for parent, held in parents.items():
        if parent[-1:] != ("vars",):
            for name, entry in held.items():
                yield "/".join((*parent, name)).removeprefix("model_weights/").removesuffix(":0"), entry
            continue
        layer = parent[:-1]
        children = {
            keys[len(layer)] for keys in groups if len(keys) > len(layer) and keys[: len(layer)] == layer
        }
        path = [own.get(layer[: length + 1], part) for length, part in enumerate(layer)]
        order = sorted(held, key=lambda name: (len(name), name))
        roles = _roles(layer[-1] if layer else "", [held[name].info.shape for name in order], children)
        for name, role in zip(order, roles, strict=True):
            known = role if name.isdecimal() and role else f"vars/{name}" if name.isdecimal() else name
            yield "/".join((*path, known)), held[name]


def _own_names(walk: _Walk) -> dict[Keys, str]:
    """The names of layers in lists that Keras keys by class and counter, where no two are the same."""
    lists: dict[Keys, dict[Keys, str]] = {}
    for keys, name in walk.names.items():
        if keys[-2:-1] == ("layers",) and "/" not in name:
            lists.setdefault(keys[:-1], {})[keys] = name
    return {
        keys: name
        for held in lists.values()
        if len(set(held.values())) == len(held)
        for keys, name in held.items()
    }


def _roles(layer: str, shapes: list[tuple[int, ...]], children: set[str]) -> list[str]:
    """What the numbered variables of a layer are; an empty name where layer, attribute and shape do not say."""
    known = _VARIABLES.get(re.sub(r"_\d+$", "", layer), ())
    if len(known) == len(shapes):
        return list(known)
    if "layer" in children and shapes and len(shapes[0]) == 2 and shapes[0][0] == 1:
        # A wrapper that normalises the layer in it.
        return ["vector_u", *([""] * (len(shapes) - 1))]
    if {"query", "key", "value"} <= children and shapes and math.prod(shapes[0]) == 1:
        return ["gamma", *([""] * (len(shapes) - 1))]
    if [len(shape) for shape in shapes[1:]] in ([], [1]) and shapes and len(shapes[0]) > 1:
        return ["kernel", "bias"][: len(shapes)]
    return [""] * len(shapes)
