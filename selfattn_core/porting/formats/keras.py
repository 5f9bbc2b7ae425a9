"""Reads and writes Keras' HDF5 files: `.weights.h5`, the one inside `.keras`, and the older `.h5`.

Keras 3 stores the variables of a layer as `vars/0`, `vars/1` below the layer's path of attributes. The reader gives them their
names if the layer and the attribute determine them, and keeps the numbers otherwise. Keras lists the layers of a model by their
class and a counter, and stores their own name as an attribute. The reader uses that name.

Source: keras/src/saving/saving_lib.py and legacy/saving/legacy_h5_format.py for the layout.
"""

import io
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from selfattn_core.arrays import contiguous
from selfattn_core.installed import imported, require
from selfattn_core.params import KV_POOL
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats.format import Format
from selfattn_core.porting.formats.tensors import Array, Entry, Tensors
from selfattn_core.porting.formats.untrusted.file import Source
from selfattn_core.porting.formats.untrusted.hdf5 import SIGNATURE, Dataset, Hdf5
from selfattn_core.porting.formats.untrusted.limits import MAX_DEPTH
from selfattn_core.porting.formats.untrusted.zip import Archive

__all__ = ["FORMATS", "open_h5", "open_keras", "open_shards"]

# Separates the name of an attribute that is stored in pieces from the number of the piece.
_CONTINUED = " continued "
Keys = tuple[str, ...]

_WEIGHTS = "model.weights.h5"
_OURS = "selfattn>SelfAttention2D"
# Attributes of older files that describe the model.
_CONFIGS = {"model_config", "training_config"}
# The variables of Keras' layers in the order in which Keras saves them, by class name in a list of layers.
_VARIABLES = {
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "layer_normalization": ("gamma", "beta"),
    "group_normalization": ("gamma", "beta"),
    "embedding": ("embeddings",),
    "spectral_normalization": ("vector_u",),
}

# Keras' number or name for a variable, by its name here.
_ORDER = {"kernel": "0", "bias": "1", "gamma": "0", "u": "u", "v": "v"}
# The characters in a piece of an attribute. Each can take four bytes.
_ATTRIBUTE = 15_000


def open_h5(path: Path) -> Tensors:
    """List the variables of a `.weights.h5` or `.h5` file.

    Args:
        path: the path of the file.

    Raises:
        PortError: with every problem, if the file is truncated or damaged, if a link points elsewhere, or if an array is larger
            than the file, compressed, or in another file.
    """
    source = Source(path)
    try:
        return _open(source, 0, source.size, {}, source.close)
    except BaseException:
        source.close()
        raise


def open_keras(path: Path) -> Tensors:
    """List the variables of a `.keras` archive, without building the model that it describes.

    Args:
        path: the path of the file.

    Raises:
        PortError: as `open_h5`, or if the archive is damaged or deceptive.
    """
    archive = Archive(Source(path))
    try:
        if _WEIGHTS not in archive.members:
            raise PortError(f"{path}: is a .keras archive without {_WEIGHTS}. Save the model as one file.")
        place = archive.place(_WEIGHTS)
        size = archive.members[_WEIGHTS].file_size
        pools = _pools(_json(archive, "config.json"))
        return _open(archive.source, place, size, _versions(archive), archive.close, pools)
    except BaseException:
        archive.close()
        raise


def open_shards(path: Path, files: list[Path]) -> Tensors:
    """List the variables of several `.weights.h5` files of one model. A layer may be in two of them.

    Args:
        path: the path of their index, for messages.
        files: all files.

    Raises:
        PortError: as `open_h5`, or if a variable is in two of them.
    """
    with ExitStack() as stack:
        shards = []
        for file in files:
            source = Source(file)
            stack.callback(source.close)
            shards.append(Hdf5(source, 0, source.size))
        return _tensors(path, _Shards(path, shards), {}, stack.pop_all().close)


class _Shards:
    """The content of several files, as if they were one."""

    def __init__(self, path: Path, files: list[Hdf5]) -> None:
        self.problems = [problem for file in files for problem in file.problems]
        self.datasets: dict[Keys, Dataset] = {}
        self.texts: dict[Keys, dict[str, str]] = {}
        self._owners: dict[int, Hdf5] = {}
        for file in files:
            for keys, dataset in file.datasets.items():
                if keys in self.datasets:
                    raise PortError(
                        f"{path}: its files hold {'/'.join(keys)} twice, so it is unclear which one counts."
                    )
                self.datasets[keys] = dataset
                self._owners[id(dataset)] = file
            self.texts |= file.texts

    def read(self, name: str, dataset: Dataset) -> NDArray[Any]:
        return self._owners[id(dataset)].read(name, dataset)


def _versions(archive: Archive) -> dict[str, str]:
    content = _json(archive, "metadata.json")
    return {"keras_version": str(content["keras_version"])} if "keras_version" in content else {}


def _json(archive: Archive, name: str) -> dict[str, Any]:
    """A JSON object of the archive. Empty if there is none."""
    try:
        content = json.loads(archive.read(name))
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _pools(model: dict[str, Any]) -> dict[str, int]:
    """The pooling of our layers by the path to their variables, from the config of a model."""
    found = {}
    waiting: list[tuple[dict[str, Any], Keys]] = [(model, ())]
    while waiting:
        layer, path = waiting.pop()
        config = layer.get("config")
        if len(path) > MAX_DEPTH or not isinstance(config, dict):
            continue
        pool = config.get("kv_pool")
        if (
            _OURS in (layer.get("class_name"), layer.get("registered_name"))
            and type(pool) is int
            and pool > 0
        ):
            found["/".join(path)] = pool
        children = config.get("layers")
        for child in children if isinstance(children, list) else ():
            inner = child.get("config") if isinstance(child, dict) else None
            if isinstance(inner, dict):
                waiting.append((child, (*path, "layers", str(inner.get("name")))))
        # A wrapper, or a layer that is an attribute of one.
        for name, child in config.items():
            if isinstance(child, dict) and "class_name" in child:
                waiting.append((child, (*path, name)))
    return found


def _open(
    source: Source,
    begin: int,
    size: int,
    metadata: dict[str, str],
    close: Callable[[], object],
    pools: Mapping[str, int] | None = None,
) -> Tensors:
    return _tensors(source.path, Hdf5(source, begin, size), metadata, close, pools)


def _tensors(
    path: Path,
    file: Hdf5 | _Shards,
    metadata: dict[str, str],
    close: Callable[[], object],
    pools: Mapping[str, int] | None = None,
) -> Tensors:
    if file.problems:
        raise PortError(f"{path}: cannot be read:\n" + "\n".join(f"  {line}" for line in file.problems[:50]))
    entries: dict[str, Entry] = {}
    for name, dataset in _named(file):
        if name in entries:
            raise PortError(f"{path}: holds {name} twice, so it is unclear which one counts.")
        entries[name] = Entry(dataset.info, lambda n=name, d=dataset: file.read(n, d))  # type: ignore[misc]
    if not entries:
        raise PortError(f"{path}: holds no variables. Expected weights that Keras saved.")
    texts = file.texts.get((), {})
    return Tensors(
        path,
        "keras",
        entries,
        metadata | _attributes(texts),
        close,
        pools=_old_pools(texts, entries) | dict(pools or {}) | _noted_pools(file),
    )


def _noted_pools(file: Hdf5 | _Shards) -> dict[str, int]:
    """The pooling that our layers stored beside their variables."""
    own = _own_names(file)
    return {
        "/".join(_path(keys[:-1], own)): int(texts[KV_POOL])
        for keys, texts in file.texts.items()
        if keys[-1:] == ("vars",) and re.fullmatch("[1-9][0-9]{0,8}", texts.get(KV_POOL, ""))
    }


def _path(layer: Keys, own: Mapping[Keys, str]) -> list[str]:
    return [own.get(layer[: length + 1], part) for length, part in enumerate(layer)]


def _old_pools(texts: Mapping[str, str], entries: Mapping[str, Entry]) -> dict[str, int]:
    """The pooling of our layers in an older `.h5`, which stores the model's config as text and paths by names of layers."""
    try:
        model = json.loads(texts["model_config"])
    except (KeyError, ValueError, RecursionError):
        return {}
    found = _pools(model) if isinstance(model, dict) else {}
    names = {path.rpartition("/")[2]: pool for path, pool in found.items()}
    if len(names) < len(found):
        return {}
    prefixes = [name.removesuffix("/gamma") for name in entries if name.endswith("/gamma")]
    return {prefix: names[last] for prefix in prefixes if (last := prefix.rpartition("/")[2]) in names}


def _attributes(texts: dict[str, str]) -> dict[str, str]:
    """The text attributes of the file, where our writer stores its metadata. Long texts are in pieces."""
    joined: dict[str, str] = {}
    for name in sorted(set(texts) - _CONFIGS, key=lambda name: (len(name), name)):
        key = name.partition(_CONTINUED)[0]
        joined[key] = joined.get(key, "") + texts[name]
    return joined


def _named(file: Hdf5 | _Shards) -> Iterator[tuple[str, Dataset]]:
    """The variables with their names, from layers and attributes."""
    parents: dict[Keys, dict[str, Dataset]] = {}
    for keys, dataset in file.datasets.items():
        parents.setdefault(keys[:-1], {})[keys[-1]] = dataset
    groups = {keys[:length] for keys in file.datasets for length in range(len(keys))}
    own = _own_names(file)
    for parent, held in parents.items():
        if parent[-1:] != ("vars",):
            for name, dataset in held.items():
                yield "/".join((*parent, name)).removeprefix("model_weights/").removesuffix(":0"), dataset
            continue
        layer = parent[:-1]
        children = {
            keys[len(layer)] for keys in groups if len(keys) > len(layer) and keys[: len(layer)] == layer
        }
        path = _path(layer, own)
        # Our spectral norm stores its state under names, beside the numbers of the convolution.
        for name in (name for name in held if not name.isdecimal()):
            yield "/".join((*path, name)), held[name]
        order = sorted((name for name in held if name.isdecimal()), key=lambda name: (len(name), name))
        roles = _roles(layer[-1] if layer else "", [held[name].info.shape for name in order], children)
        for name, role in zip(order, roles, strict=True):
            yield "/".join((*path, role or f"vars/{name}")), held[name]


def _own_names(file: Hdf5 | _Shards) -> dict[Keys, str]:
    """The names of layers in lists that Keras keys by class and counter, if all names in the list differ."""
    lists: dict[Keys, dict[Keys, str]] = {}
    for keys, texts in file.texts.items():
        name = texts.get("name", "")
        if keys[-3:-2] == ("layers",) and keys[-1] == "vars" and name and "/" not in name:
            lists.setdefault(keys[:-2], {})[keys[:-1]] = name
    return {
        keys: name
        for held in lists.values()
        if len(set(held.values())) == len(held)
        for keys, name in held.items()
    }


def _roles(layer: str, shapes: list[tuple[int, ...]], children: set[str]) -> list[str]:
    """The names of the numbered variables of a layer. "" if layer, attribute and shape do not determine one."""
    known = _VARIABLES.get(re.sub(r"_\d+$", "", layer), ())
    if len(known) == len(shapes):
        return list(known)
    if "layer" in children and shapes and len(shapes[0]) == 2 and shapes[0][0] == 1:
        # A wrapper that normalises its inner layer.
        return ["vector_u", *([""] * (len(shapes) - 1))]
    if {"query", "key", "value"} <= children and shapes and math.prod(shapes[0]) == 1:
        return ["gamma", *([""] * (len(shapes) - 1))]
    if [len(shape) for shape in shapes[1:]] in ([], [1]) and shapes and len(shapes[0]) > 1:
        return ["kernel", "bias"][: len(shapes)]
    return [""] * len(shapes)


def _content(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    require("selfattn_core.porting", ["h5py"], "keras")
    h5py = imported("h5py")
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        for name, array in tensors.items():
            layer, _, variable = name.rpartition("/")
            number = variable if variable.isdecimal() else _ORDER.get(variable)
            if number is None:
                raise PortError(
                    f"{name}: Keras stores variables by number, and the number of {variable!r} is unknown. Expected "
                    f"{', '.join(_ORDER)} or vars/<number>."
                )
            group = layer.removesuffix("vars").removesuffix("/")
            file[f"{group}/vars/{number}".lstrip("/")] = contiguous(array)
        for key, value in metadata.items():
            # An attribute holds 64 KiB at most.
            for start in range(0, max(1, len(value)), _ATTRIBUTE):
                piece = f"{key}{_CONTINUED}{start // _ATTRIBUTE}" if start else key
                file.attrs[piece] = value[start : start + _ATTRIBUTE]
    return content.getvalue()


def _is_archive(names: Collection[str]) -> bool:
    return "config.json" in names or any(name.endswith(".h5") for name in names)


FORMATS = (
    # The writer makes the `.weights.h5` that a model loads, because only Keras can write the model's description.
    Format("keras", open_keras, ".keras", is_archive=_is_archive, file=_content),
    Format("h5", open_h5, ".h5", begins=lambda start: start.startswith(SIGNATURE)),
)
