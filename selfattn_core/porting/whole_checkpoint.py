"""Writes a whole checkpoint in which attention blocks have other names and everything else stays as it is.

A PyTorch file is loaded by torch with `weights_only=True`, after our reader has checked that the pickle holds only tensors and
settings. So nested dictionaries, dtypes, shared tensors and the versions of modules stay. The bytes of a `.safetensors` file
are copied.
"""

import io
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.files.safetensors import CODES, header_bytes
from selfattn_core.files.writing import write_atomically
from selfattn_core.installed import imported, require
from selfattn_core.params import KV_POOL
from selfattn_core.porting.blocks.bystanders import optimiser_keys
from selfattn_core.porting.errors import PortError, target_exists
from selfattn_core.porting.formats.torch import add_metadata
from selfattn_core.porting.formats.torch_names import names_of
from selfattn_core.porting.formats.untrusted.file import Source
from selfattn_core.problems import Remedy

__all__ = ["WHOLE", "Renamed", "write_whole"]

Keys = tuple[Any, ...]
WHOLE = ("torch", "safetensors")


@dataclass(frozen=True)
class Renamed:
    """A block in its new form.

    Args:
        prefix: the beginning of its keys, as our reader shows them.
        gone: its keys in the source, as our reader shows them.
        tensors: its new tensors by key, without the prefix.
        kv_pool: the pooling of the layer.
    """

    prefix: str
    gone: frozenset[str]
    tensors: Mapping[str, Array]
    kv_pool: int


def write_whole(
    source: Path,
    target: Path,
    format: str,
    blocks: list[Renamed],
    metadata: Mapping[str, str],
    *,
    overwrite: bool,
) -> None:
    """Write the source with its blocks renamed, and without an optimiser's state.

    Args:
        source: a checkpoint that has been opened.
        target: the path to write.
        format: the format of both, one of `WHOLE`.
        blocks: the blocks in their new form.
        metadata: the metadata of the port, which is stored if the format has a place for it.
        overwrite: whether an existing target may be replaced.

    Raises:
        PortError: if the tensors of a block are not all in one dictionary.
        ModuleNotFoundError: if the file is PyTorch's and torch is not installed.
    """
    content: Iterator[bytes] = (
        iter([_torch(source, blocks, metadata)])
        if format == "torch"
        else _safetensors(source, blocks, metadata)
    )
    try:
        write_atomically(target, content, overwrite=overwrite)
    except FileExistsError:
        raise target_exists(target) from None
    except OSError as error:
        raise PortError(
            f"{target}: cannot be written: {error.strerror or error}. Nothing was written or replaced."
        ) from error


def _torch(source: Path, blocks: list[Renamed], metadata: Mapping[str, str]) -> bytes:
    require("selfattn_core.porting", ["torch"], "torch")
    torch = imported("torch")
    try:
        root = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        raise PortError(
            f"{source}: torch cannot load all of it with weights_only=True ({str(error).splitlines()[0][:200]}). Load it with "
            "the code that wrote it, save only its state dicts, and port that file."
        ) from None
    found = list(_leaves(root, (), torch.Tensor))
    names = names_of([tuple(map(str, keys)) for keys in found], root)
    places = dict(zip(names, found, strict=True))
    for keys in {places[name][0] for name in optimiser_keys(names) if len(places[name]) > 1}:
        root.pop(keys, None)
    for block in blocks:
        keys, prefix = _together(source, block, places)
        held = _at(root, keys)
        state = _renamed(held, prefix, block, {places[name][-1] for name in block.gone}, torch)
        state._metadata = _versions(held, prefix, block)  # noqa: SLF001 - torch keeps such data there
        if not keys:
            root = state
        else:
            _at(root, keys[:-1])[keys[-1]] = state
    if isinstance(root, OrderedDict) and hasattr(root, "_metadata"):
        add_metadata(root, metadata)
    content = io.BytesIO()
    torch.save(root, content)
    return content.getvalue()


def _leaves(value: Any, keys: Keys, kind: type) -> Iterator[Keys]:
    """The keys on the way to each tensor, in the order of our reader."""
    if isinstance(value, kind):
        yield keys or ("tensor",)
    elif isinstance(value, dict | list | tuple):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(child, (*keys, key), kind)


def _at(value: Any, keys: Keys) -> Any:
    for key in keys:
        value = value[key]
    return value


def _together(source: Path, block: Renamed, places: Mapping[str, Keys]) -> tuple[Keys, str]:
    """The dictionary that contains a block's tensors, and the prefix of their names in it."""
    found = set()
    for name in block.gone:
        keys, rest = places[name], name.removeprefix(block.prefix)
        last = str(keys[-1])
        found.add((keys[:-1], last.removesuffix(rest) if last.endswith(rest) else None))
    if len(found) == 1:
        ((keys, prefix),) = found
        if prefix is not None:
            return keys, prefix
    raise PortError(
        (
            f"{source}: the tensors of the block {block.prefix!r} are in several dictionaries, not in one state dict. Port the ",
            "block alone, without ",
            Remedy("whole", value=True),
            ".",
        ),
        kind="whole",
        names=[block.prefix],
    )


def _renamed(held: Mapping[Any, Any], prefix: str, block: Renamed, gone: set[Any], torch: Any) -> Any:
    state: Any = OrderedDict()
    new = {f"{prefix}{name}": block.tensors[name] for name in block.tensors}
    for key, value in held.items():
        if key not in gone:
            state[key] = value
            continue
        for name, array in new.items():
            state[name] = torch.from_numpy(np.array(array, order="C"))
        new = {}
    return state


def _versions(held: Any, prefix: str, block: Renamed) -> Any:
    """Torch's versions of modules, with those of the block's new modules."""
    module = prefix.removesuffix(".")
    old = getattr(held, "_metadata", {})
    kept = {
        name: value for name, value in old.items() if name != module and not name.startswith(f"{module}.")
    }
    children = {name.rpartition(".")[0] for name in block.tensors if "." in name}
    kept[module] = {"version": 1, KV_POOL: block.kv_pool}
    return OrderedDict(kept | {f"{prefix}{child}": {"version": 1} for child in sorted(children)})


def _safetensors(source: Path, blocks: list[Renamed], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """The file in pieces. The bytes of all other tensors are copied."""
    file = Source(source)
    try:
        length = int.from_bytes(file.bytes_at(0, 8), "little")
        header = json.loads(file.bytes_at(8, length))
        own = header.pop("__metadata__", None) or {}
        passed_over = optimiser_keys(header)
        gone = {name: block for block in blocks for name in block.gone}
        rows: dict[str, Any] = {"__metadata__": own | dict(metadata)}
        sources: list[tuple[int, int] | Array] = []
        place = 0
        done: set[str] = set()
        for key, row in header.items():
            block = gone.get(key)
            if key in passed_over or (block and block.prefix in done):
                continue
            if block is None:
                begin, end = row["data_offsets"]
                rows[key] = {**row, "data_offsets": [place, place + end - begin]}
                sources.append((8 + length + begin, end - begin))
                place += end - begin
                continue
            done.add(block.prefix)
            for name in block.tensors:
                array = np.array(block.tensors[name], order="C")
                offsets = [place, place + array.nbytes]
                rows[block.prefix + name] = {
                    "dtype": CODES[array.dtype.name],
                    "shape": list(array.shape),
                    "data_offsets": offsets,
                }
                sources.append(array)
                place = offsets[1]
        yield header_bytes(rows)
        for piece in sources:
            yield piece.tobytes() if isinstance(piece, np.ndarray) else file.bytes_at(*piece)
    finally:
        file.close()
