"""Reads checkpoints in several files with a JSON index, whose `weight_map` maps names to files beside it.

Sources: the index of Hugging Face's libraries (`model.safetensors.index.json`, `pytorch_model.bin.index.json`);
keras/src/saving/saving_lib.py, ShardedH5IOStore (`model.weights.json`), which maps groups to files, sometimes to several.
"""

import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats.keras import open_shards
from selfattn_core.porting.formats.tensors import Entry, Tensors
from selfattn_core.porting.formats.untrusted.file import Source
from selfattn_core.porting.formats.untrusted.limits import MAX_HEADER, MAX_TENSORS

__all__ = ["index_in", "looks_like_index", "of_several", "open_index"]

# Files that may be open at the same time. Systems allow 1024.
_MOST_FILES = 500
# Weights in one file. They are tried before indices.
_WHOLE = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.|_\d{5}\.weights\.h5$")
_INDICES = ("*.safetensors.index.json", "*.bin.index.json", "*.weights.json")


def index_in(folder: Path) -> Path | None:
    """The weights in a model's folder from Hugging Face's libraries or Keras: a file or an index.

    Raises:
        PortError: if there are several indices and no single file.

    Example:
        >>> index_in(Path("there-is-no-such-folder")) is None
        True
    """
    for name in _WHOLE:
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for pattern in _INDICES for path in folder.glob(pattern))
    if len(found) > 1:
        raise PortError(f"{folder}: holds {len(found)} indices, name one: {', '.join(map(str, found[:10]))}.")
    return found[0] if found else None


def looks_like_index(start: bytes) -> bool:
    """Whether a file that begins with these bytes could be an index.

    Example:
        >>> looks_like_index(b'  {"weight_map": {}}')
        True
    """
    return start.lstrip()[:1] == b"{"


def of_several(path: Path) -> str:
    """The message for a file that is one of several, judging by its name. "" for any other file.

    Example:
        >>> of_several(Path("weights/model-00001-of-00002.safetensors"))
        'model-00001-of-00002.safetensors is one of several files of a model: name the index beside it, *.json, or the folder weights'
        >>> of_several(Path("weights/model.safetensors"))
        ''
    """
    if not _SHARD.search(path.name):
        return ""
    found = [each.name for pattern in _INDICES for each in sorted(path.parent.glob(pattern))]
    index = f"name the index beside it, {', '.join(found) or '*.json'}, or the folder {path.parent}"
    return f"{path.name} is one of several files of a model: {index}"


def open_index(path: Path, opened: Callable[[Path], Tensors]) -> Tensors:
    """List the tensors of all files of an index.

    Args:
        path: the path of the index.
        opened: a function that opens one of the files.

    Raises:
        PortError: if it is not an index, if a file is missing, in another folder or of another kind, or if a name is in no
            file or in two.
    """
    where = _weight_map(path)
    names = list(dict.fromkeys(name for files in where.values() for name in files))
    if len(names) > _MOST_FILES:
        raise PortError(f"{path}: names {len(names)} files; at most {_MOST_FILES} are opened.")
    absent = [name for name in names if not (path.parent / name).is_file()]
    if absent:
        raise PortError(
            f"{path}: {len(absent)} of its {len(names)} files are not beside it: {', '.join(absent[:6])}; download them too."
        )
    if all(name.endswith(".h5") for name in names):
        return open_shards(path, [path.parent / name for name in names])
    with ExitStack() as stack:
        files = {name: stack.enter_context(opened(path.parent / name)) for name in names}
        entries: dict[str, Entry] = {}
        problems = []
        for key, (name, *more) in where.items():
            tensors = files[name]
            # PyTorch's reader removes this prefix of a parallel module if every name in a file has it.
            held = key if key in tensors else key.removeprefix("module.")
            if more or held not in tensors:
                problems.append(f"{key}: {'is in several files' if more else f'is not in {name}'}")
                continue
            entries[key] = Entry(tensors[held], lambda t=tensors, k=held: t.read(k))  # type: ignore[misc]
        if problems:
            raise PortError(f"{path}: does not fit its files:\n" + "\n".join(f"  {p}" for p in problems[:50]))
        first = files[names[0]]
        metadata = {"files": str(len(names))}
        return Tensors(path, first.format, entries, metadata, stack.pop_all().close)


def _weight_map(path: Path) -> dict[str, list[str]]:
    """The files of each name. A file name that points to another folder is refused."""
    source = Source(path)
    try:
        if source.size > MAX_HEADER:
            raise PortError(f"{path}: has {source.size} bytes; at most {MAX_HEADER} of an index are read.")
        content = json.loads(source.bytes_at(0, source.size))
    except (ValueError, RecursionError) as error:
        if isinstance(error, PortError):
            raise
        raise PortError(f"{path}: is not an index of a checkpoint: it is not JSON ({error}).") from None
    finally:
        source.close()
    held: Any = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(held, dict) or not held or len(held) > MAX_TENSORS:
        raise PortError(
            f"{path}: is JSON without the weight_map of an index. Name the file of the weights itself."
        )
    found = {}
    for key, value in held.items():
        files = value if isinstance(value, list) else [value]
        if not files or not all(isinstance(name, str) and _is_beside(name) for name in files):
            raise PortError(
                f"{path}: {key[:200]} is in {str(value)[:200]}, which is not a file beside the index."
            )
        found[key] = files
    return found


def _is_beside(name: str) -> bool:
    return bool(name) and "\0" not in name and name not in (".", "..") and not {"/", "\\"} & set(name)
