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
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from selfattn_core.installed import imported, require
from selfattn_core.params import KV_POOL
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats.format import Format
from selfattn_core.porting.formats.numbers import contiguous
from selfattn_core.porting.formats.tensors import Array, Entry, Tensors
from selfattn_core.porting.formats.untrusted.file import Source
from selfattn_core.porting.formats.untrusted.hdf5 import SIGNATURE, Dataset, Hdf5
from selfattn_core.porting.formats.untrusted.limits import MAX_DEPTH
from selfattn_core.porting.formats.untrusted.zip import Archive

__all__ = ["FORMATS", "open_h5", "open_keras", "open_shards"]

# Between the name of an attribute that is too long for one and the number of the piece.
_CONTINUED = " continued "
Keys = tuple[str, ...]

_WEIGHTS = "model.weights.h5"
_OURS = "selfattn>SelfAttention2D"
# Attributes of older files that describe the model.
_CONFIGS = {"model_config", "training_config"}
# Variables of layers of Keras in the order in which they save them. By the class, in a list of layers.
_VARIABLES = {
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "layer_normalization": ("gamma", "beta"),
    "group_normalization": ("gamma", "beta"),
    "embedding": ("embeddings",),
    "spectral_normalization": ("vector_u",),
}

# The number or name under which Keras stores a variable, by its name here.
_ORDER = {"kernel": "0", "bias": "1", "gamma": "0", "u": "u", "v": "v"}
# Characters of a piece of an attribute, of which one can take four bytes.
_ATTRIBUTE = 15_000


def open_h5(path: Path) -> Tensors:
    """The variables of a `.weights.h5` or `.h5` file.

    Args:
        path: of the file.

    Raises:
        PortError: if the file is truncated or damaged, a link in it leads elsewhere, or an array promises more than the
            file holds, is compressed, or lies in another file; lists every problem.
    """
    source = Source(path)
    try:
        return _open(source, 0, source.size, {}, source.close)
    except BaseException:
        source.close()
        raise


def open_keras(path: Path) -> Tensors:
    """The variables of a `.keras` archive; nothing of the model that it describes is built.

    Args:
        path: of the file.

    Raises:
        PortError: as `open_h5`, or if the archive is damaged or made to deceive.
    """
    archive = Archive(Source(path))
    try:
        if _WEIGHTS not in archive.members:
            raise PortError(f"{path}: is a .keras archive without {_WEIGHTS}; save the model as one file.")
        place = archive.place(_WEIGHTS)
        size = archive.members[_WEIGHTS].file_size
        pools = _pools(_json(archive, "config.json"))
        return _open(archive.source, place, size, _versions(archive), archive.close, pools)
    except BaseException:
        archive.close()
        raise


def open_shards(path: Path, files: list[Path]) -> Tensors:
    """The variables of several `.weights.h5` files that are one; a layer may lie in two of them.

    Args:
        path: of their index, for messages.
        files: all of them.

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
    """The content of several files as of one."""

    def __init__(self, path: Path, files: list[Hdf5]) -> None:
        self.problems = [problem for file in files for problem in file.problems]
        self.datasets: dict[Keys, Dataset] = {}
        self.texts: dict[Keys, dict[str, str]] = {}
        self._owners: dict[int, Hdf5] = {}
        for file in files:
            for keys, dataset in file.datasets.items():
                if keys in self.datasets:
                    raise PortError(
                        f"{path}: its files hold {'/'.join(keys)} twice; which one is meant cannot be known."
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
    """A JSON object of the archive; an empty one if it is not there, or is none."""
    try:
        content = json.loads(archive.read(name))
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _pools(model: dict[str, Any]) -> dict[str, int]:
    """The pooling of layers of ours by the path to their variables, from the config of a model."""
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
        raise PortError(f"{path}: is not read:\n" + "\n".join(f"  {line}" for line in file.problems[:50]))
    entries: dict[str, Entry] = {}
    for name, dataset in _named(file):
        if name in entries:
            raise PortError(f"{path}: holds {name} twice; which one is meant cannot be known.")
        entries[name] = Entry(dataset.info, lambda n=name, d=dataset: file.read(n, d))  # type: ignore[misc]
    if not entries:
        raise PortError(f"{path}: holds no variables; expected weights that Keras saved.")
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
    """The pooling of layers of ours that noted it beside their variables."""
    own = _own_names(file)
    return {
        "/".join(_path(keys[:-1], own)): int(texts[KV_POOL])
        for keys, texts in file.texts.items()
        if keys[-1:] == ("vars",) and re.fullmatch("[1-9][0-9]{0,8}", texts.get(KV_POOL, ""))
    }


def _path(layer: Keys, own: Mapping[Keys, str]) -> list[str]:
    return [own.get(layer[: length + 1], part) for length, part in enumerate(layer)]


def _old_pools(texts: Mapping[str, str], entries: Mapping[str, Entry]) -> dict[str, int]:
    """The pooling of layers of ours in an older `.h5`, which holds the model's config as text and paths by names of layers."""
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
    """The texts among the attributes of the file, where our own writer keeps its metadata, long ones in pieces."""
    joined: dict[str, str] = {}
    for name in sorted(set(texts) - _CONFIGS, key=lambda name: (len(name), name)):
        key = name.partition(_CONTINUED)[0]
        joined[key] = joined.get(key, "") + texts[name]
    return joined


def _named(file: Hdf5 | _Shards) -> Iterator[tuple[str, Dataset]]:
    """Names of the variables, by layers and attributes."""
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
        # Our spectral norm keeps its state under names, beside the numbers of the convolution.
        for name in (name for name in held if not name.isdecimal()):
            yield "/".join((*path, name)), held[name]
        order = sorted((name for name in held if name.isdecimal()), key=lambda name: (len(name), name))
        roles = _roles(layer[-1] if layer else "", [held[name].info.shape for name in order], children)
        for name, role in zip(order, roles, strict=True):
            yield "/".join((*path, role or f"vars/{name}")), held[name]


def _own_names(file: Hdf5 | _Shards) -> dict[Keys, str]:
    """The names of layers in lists that Keras keys by class and counter, where no two are the same."""
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
                    f"{name}: Keras stores variables by number, and which one {variable!r} has is not known; expected "
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
    # What is written is the `.weights.h5` that a model loads, for only Keras can write its description.
    Format("keras", open_keras, ".keras", is_archive=_is_archive, file=_content),
    Format("h5", open_h5, ".h5", begins=lambda start: start.startswith(SIGNATURE)),
)
