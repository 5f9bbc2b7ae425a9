"""Reads both formats of PyTorch's `.pt`, `.pth`, `.bin` and `.tar` without torch and without executing anything.

`torch_pickle` interprets the pickle in the file without running it, and the tensors are read from the places that it gives. A
file that `torch.load(weights_only=True)` refuses is refused here too. The error lists the names that it would have imported.

Source: torch/serialization.py for the two formats.
"""

import collections
import io
import math
import mmap
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from selfattn_core.arrays import contiguous
from selfattn_core.installed import imported, require
from selfattn_core.params import KV_POOL
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats.format import Format
from selfattn_core.porting.formats.numbers import bits, read_array, stored_bytes
from selfattn_core.porting.formats.tensors import Array, Entry, TensorInfo, Tensors
from selfattn_core.porting.formats.torch_names import names_and_wrappers
from selfattn_core.porting.formats.untrusted import numpy_pickle
from selfattn_core.porting.formats.untrusted.file import Source
from selfattn_core.porting.formats.untrusted.limits import MAX_DEPTH, MAX_TENSORS, SMALL, checked_shape
from selfattn_core.porting.formats.untrusted.numpy_pickle import NumpyArray
from selfattn_core.porting.formats.untrusted.torch_pickle import Storage, Tensor, Unpickled, unpickle
from selfattn_core.porting.formats.untrusted.zip import Archive, Member

__all__ = ["FORMATS", "add_metadata", "open_torch", "open_torch_legacy"]

# The key of our writer's metadata among PyTorch's versions of modules. No key of a state dict has this name.
_METADATA = "selfattn metadata"
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001

# Returns the numbers [first, last) of a storage.
Fetch = Callable[[int, int], Array]


def open_torch(path: Path) -> Tensors:
    """List the tensors of a zip archive that torch 1.6 or later wrote.

    Args:
        path: the path of the file.

    Raises:
        PortError: with every problem, if the archive is damaged or deceptive, if its pickle would import anything, or if a
            tensor is outside the file.
    """
    archive = Archive(Source(path))
    try:
        pickles = [name for name in archive.members if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise PortError(f"{path}: is a zip archive, but not a checkpoint of torch: {_listing(archive)}.")
        folder = pickles[0].removesuffix("data.pkl")
        if any(name.startswith(f"{folder}code/") for name in archive.members):
            raise PortError(
                f"{path}: is a TorchScript program, not a state dict. Load it with torch.jit.load and save its state_dict()."
            )
        if f"{folder}byteorder" in archive.members and archive.read(f"{folder}byteorder") != b"little":
            raise PortError(
                f"{path}: was written on a big-endian machine. Load it with torch and save it again."
            )
        content = _unpickle(path, archive.read(pickles[0]))
        checked: set[str] = set()

        def storage(key: str, dtype: str, numel: int) -> Fetch:
            return _zip_storage(archive, f"{folder}data/{key}", dtype, numel, checked)

        return _tensors(path, content, storage, archive.close)
    except BaseException:
        archive.close()
        raise


def open_torch_legacy(path: Path) -> Tensors:
    """List the tensors of a file that torch 0.1.10 to 1.5 wrote, or a later torch on request: pickles, then storages.

    Args:
        path: the path of the file.

    Raises:
        PortError: as `open_torch`.
    """
    source = Source(path)
    try:
        with mmap.mmap(source.file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            first = _unpickle(path, view, torch=False)
            if first.value != _MAGIC or _unpickle(path, view).value != _PROTOCOL:
                return _arrays(path, first, source.close)
            system = _unpickle(path, view).value
            if not isinstance(system, dict) or system.get("little_endian") is not True:
                raise PortError(
                    f"{path}: was written on a big-endian machine. Load it with torch and save it again."
                )
            content = _unpickle(path, view)
            keys = _unpickle(path, view).value
            place = view.tell()
        if (
            not isinstance(keys, list)
            or len(keys) > MAX_TENSORS
            or not all(isinstance(key, str) for key in keys)
        ):
            raise PortError(f"{path}: is damaged: its list of storages is malformed.")
        places = _legacy_places(source, content.storages, keys, place)

        def storage(key: str, dtype: str, numel: int) -> Fetch:
            return _legacy_storage(source, places.get(key), key, dtype, numel)

        return _tensors(path, content, storage, source.close)
    except BaseException:
        source.close()
        raise


def _listing(archive: Archive) -> str:
    names = list(archive.members)
    return f"it holds {', '.join(names[:6]) or 'nothing'}{', …' if len(names) > 6 else ''}"


def _unpickle(path: Path, file: Any, *, torch: bool = True) -> Unpickled:
    try:
        content = unpickle(file)
    except PortError as error:
        raise PortError(f"{path}: {error}.") from None
    if content.blocked:
        wanted = (
            f"Expected a state dict. If you trust the file, load it with the code that wrote it, and save only {_alone(content.value)}."
            if torch
            else "Expected arrays. If you trust the file, load it with the code that wrote it, and save its arrays with numpy.savez, "
            "or a model's state_dict() with torch.save."
        )
        raise PortError(
            f"{path}: loading it would import and could run {', '.join(content.blocked[:20])}; nothing was executed. {wanted}"
        )
    return content


def _alone(value: Any) -> str:
    """The parts of a checkpoint to save again: the state dicts in it, or a model's."""
    held = [
        f"checkpoint[{name!r}]"
        for name, inner in (value.items() if isinstance(value, dict) else ())
        if isinstance(inner, dict) and any(isinstance(tensor, Tensor) for tensor in inner.values())
    ]
    return " or ".join(held[:4]) or "model.state_dict()"


def _arrays(path: Path, content: Unpickled, close: Callable[[], object]) -> Tensors:
    """The numpy arrays in a pickle that is not PyTorch's, for example of Paddle (`.pdparams`) or of Flax parameters."""

    def storage(key: str, dtype: str, numel: int) -> Fetch:
        raise PortError(f"its storage {key} of {numel} numbers of {dtype} is not in the file")

    if not any(isinstance(value, NumpyArray) for _, value in _walk(path, content.value, (), 0)):
        raise PortError(
            f"{path}: is a pickle, but not a checkpoint of torch, and it holds no arrays. Nothing in it was executed."
        )
    return _tensors(path, content, storage, close, format="pickle")


def _tensors(
    path: Path,
    content: Unpickled,
    storage: Callable[[str, str, int], Fetch],
    close: Callable[[], object],
    *,
    format: str = "torch",
) -> Tensors:
    found = list(_walk(path, content.value, (), 0))
    if not found:
        raise PortError(f"{path}: holds no tensors. Expected a state dict.")
    names, metadata = names_and_wrappers([keys for keys, _ in found], content.value)
    if content.settings:
        metadata["types that were only named"] = ", ".join(content.settings)
    entries: dict[str, Entry] = {}
    left_out: dict[str, str] = {}
    problems = []
    for name, (_, tensor) in zip(names, found, strict=True):
        if name in entries:
            problems.append(f"{name}: is there twice, so it is unclear which one counts")
            continue
        try:
            where = f"{path}: {name}"
            if isinstance(tensor, NumpyArray) and not tensor.has_numbers:
                left_out[name] = f"{name}: holds Python objects or texts"
            elif isinstance(tensor, NumpyArray):
                entries[name] = numpy_pickle.entry(where, tensor)
            else:
                entries[name] = _entry(where, tensor, storage)
        except PortError as error:
            problems.append(str(error).removeprefix(f"{path}: "))
    if problems:
        raise PortError(f"{path}: tensors cannot be read:\n" + "\n".join(f"  {p}" for p in problems[:50]))
    for _, state in content.states:
        own = state.get("_metadata", {}).get(_METADATA) if isinstance(state, dict) else None
        if isinstance(own, dict):
            metadata |= {str(key): str(value) for key, value in own.items()}
    return Tensors(path, format, entries, metadata, close, left_out, _pools(content, found, names))


def _pools(
    content: Unpickled, found: list[tuple[tuple[str, ...], Tensor | NumpyArray]], names: list[str]
) -> dict[str, int]:
    """The pooling of our layers, which is stored among PyTorch's versions of modules."""
    shown = {id(tensor): name for (_, tensor), name in zip(found, names, strict=True)}
    pools = {}
    for held, state in content.states:
        versions = state.get("_metadata") if isinstance(state, dict) else None
        for module, version in versions.items() if isinstance(versions, dict) else ():
            pool = version.get(KV_POOL) if isinstance(version, dict) else None
            name = shown.get(id(held.get(f"{module}.gamma" if module else "gamma")), "")
            if type(pool) is int and pool > 0 and name:
                pools[name.removesuffix("gamma").removesuffix(".")] = pool
    return pools


def _walk(
    path: Path, value: Any, keys: tuple[str, ...], visited: int
) -> Iterator[tuple[tuple[str, ...], Tensor | NumpyArray]]:
    """Every tensor below a value, and the keys on the way to it. A shared value is visited and counted each time."""
    stack: list[tuple[tuple[str, ...], Any]] = [(keys, value)]
    while stack:
        keys, value = stack.pop()
        visited += 1
        if visited > MAX_TENSORS:
            raise PortError(f"{path}: holds more than {MAX_TENSORS} values.")
        if isinstance(value, Tensor | NumpyArray):
            yield keys or ("tensor",), value
            continue
        children = (
            value.items()
            if isinstance(value, dict)
            else enumerate(value)
            if isinstance(value, list | tuple)
            else ()
        )
        if len(keys) >= MAX_DEPTH and children:
            raise PortError(f"{path}: is nested more than {MAX_DEPTH} levels deep.")
        stack += [((*keys, str(key)), child) for key, child in children][::-1]


def _entry(where: str, tensor: Tensor, storage: Callable[[str, str, int], Fetch]) -> Entry:
    if tensor.unread:
        raise PortError(
            f"{where}: is a {tensor.unread} tensor; convert it to a plain one in torch and save it again"
        )
    if bits(tensor.dtype) is None:
        raise PortError(f"{where}: has the dtype {tensor.dtype}, which cannot be read")
    info = TensorInfo(checked_shape(where, tensor.shape), tensor.dtype)
    strides = tensor.stride
    offset = tensor.offset
    if len(strides) != len(info.shape) or not all(
        type(step) is int and step >= 0 for step in (*strides, offset)
    ):
        raise PortError(f"{where}: its strides {str(strides)[:80]} do not fit its shape {info.shape}")
    count = math.prod(info.shape)
    last = offset + 1 + sum((axis - 1) * step for axis, step in zip(info.shape, strides, strict=True))
    held = tensor.storage.numel * (bits(tensor.storage.dtype) or 0) // (bits(info.dtype) or 1)
    if count and last > held:
        raise PortError(f"{where}: {info.shape} reaches beyond its storage of {held} numbers")
    if stored_bytes(info) > max(SMALL, 2 * held * (bits(info.dtype) or 0) // 8):
        raise PortError(f"{where}: {info.shape} repeats a storage of {held} numbers; save it contiguous")
    fetch = storage(tensor.storage.key, info.dtype, held)

    def read() -> Array:
        if not count:
            return np.empty(info.shape, fetch(0, 0).dtype)
        flat = fetch(offset, last)
        steps = tuple(step * flat.itemsize for step in strides)
        view = np.lib.stride_tricks.as_strided(flat, info.shape, steps, writeable=False)
        # For a contiguous tensor this is the array that was read.
        return flat.reshape(info.shape) if view.flags.c_contiguous else np.array(view, order="C")

    return Entry(info, read)


def _zip_storage(archive: Archive, name: str, dtype: str, numel: int, checked: set[str]) -> Fetch:
    if name not in archive.members:
        raise PortError(f"its storage {name} is not in the archive")
    size = archive.members[name].file_size
    width = (bits(dtype) or 8) // 8
    if numel * width > size:
        raise PortError(f"its storage {name} should have {numel * width} bytes, it has {size}")
    place = archive.place(name)

    def fetch(first: int, last: int) -> Array:
        if name not in checked:
            # A flipped bit is a wrong weight. torch does not check it, but it writes a checksum.
            _verify(archive, name)
            checked.add(name)
        info = TensorInfo((last - first,), dtype)
        return archive.source.array_at(name, place + first * width, info)

    return fetch


def _verify(archive: Archive, name: str) -> None:
    member = Member(archive, name)
    piece = memoryview(bytearray(2**20))
    left = archive.members[name].file_size
    try:
        while left:
            member.read_into(piece[: min(left, len(piece))])
            left -= min(left, len(piece))
        member.finish()
    except PortError as error:
        raise PortError(
            f"{error} If it was saved with torch.serialization.set_crc32_options(False), save it without that."
        ) from None
    finally:
        member.close()


def _legacy_places(
    source: Source, storages: dict[str, Storage], keys: list[str], place: int
) -> dict[str, tuple[int, int]]:
    """The place and the number of the elements of each storage. The tensors that refer to it determine its width."""
    places = {}
    for key in keys:
        if key not in storages:
            raise PortError(
                f"{source.path}: storage {key} belongs to no tensor, so its size cannot be known."
            )
        width = (bits(storages[key].dtype) or 8) // 8
        numel = int.from_bytes(source.bytes_at(place, 8), "little", signed=True)
        end = place + 8 + numel * width
        if numel < 0 or end > source.size:
            raise PortError(
                f"{source.path}: is truncated or damaged: storage {key} should end at byte {end}, the file has {source.size}."
            )
        places[key] = (place + 8, numel)
        place = end
    return places


def _legacy_storage(source: Source, place: tuple[int, int] | None, key: str, dtype: str, numel: int) -> Fetch:
    if place is None or place[1] < numel:
        raise PortError(f"its storage {key} is not in the file, or shorter than {numel} numbers")
    width = (bits(dtype) or 8) // 8

    def fetch(first: int, last: int) -> Array:
        source.file.seek(place[0] + first * width)
        info = TensorInfo((last - first,), dtype)
        return read_array(f"{source.path}: storage {key}", info, source.read_into)

    return fetch


def _content(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    require("selfattn_core.porting", ["torch"], "torch")
    # By name, because this package imports no framework. The library is needed for the format.
    framework = imported("torch")
    state: Any = collections.OrderedDict(
        (name, framework.from_numpy(contiguous(array))) for name, array in tensors.items()
    )
    if metadata:
        state._metadata = {"": {}}  # noqa: SLF001 - torch keeps such data there
        add_metadata(state, metadata)
    content = io.BytesIO()
    framework.save(state, content)
    return content.getvalue()


def add_metadata(state: Any, metadata: Mapping[str, str]) -> None:
    """Store metadata in a PyTorch state dict, where `open_tensors` finds it.

    Args:
        state: a state dict with PyTorch's versions of modules.
        metadata: the metadata to store.

    Example:
        >>> state = collections.OrderedDict()
        >>> state._metadata = {"": {}}
        >>> add_metadata(state, {"source": "mine"})
        >>> state._metadata
        {'': {}, 'selfattn metadata': {'source': 'mine'}}
    """
    state._metadata[_METADATA] = dict(metadata)  # noqa: SLF001 - torch keeps such data there


def _is_archive(names: Collection[str]) -> bool:
    return any(name.rpartition("/")[2] == "data.pkl" for name in names)


def _begins(start: bytes) -> bool:
    """Whether a file begins like a pickle of protocol 2 or later. torch has never written an older one."""
    return len(start) > 1 and start[0] == 0x80 and start[1] <= 5


FORMATS = (
    Format("torch", open_torch, "PyTorch", is_archive=_is_archive, file=_content),
    Format("torch-legacy", open_torch_legacy, begins=_begins),
    Format("pickle", open_torch_legacy),
)
