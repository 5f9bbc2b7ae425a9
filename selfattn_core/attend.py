"""What `selfattn attend` does: from files of weights, features and an image to a picture of the attention map."""

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from selfattn_core import spec
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.installed import require
from selfattn_core.maps import MapStatistics, map_statistics, position_of, unflatten
from selfattn_core.params import is_floating
from selfattn_core.weights import FORMAT, load

__all__ = ["Attended", "attend_files", "read_features", "read_image"]

Array = NDArray[Any]

LARGEST_MAP = 2**28
"""Numbers in a map that is still computed, 1 GiB in float32."""


@dataclass(frozen=True)
class Attended:
    """A layer's map on one image.

    Args:
        image: (height, width) or (height, width, 3), uint8.
        grid: (H, W, H', W').
        statistics: of the map, each (H, W).
        positions: (h, w) of the feature map for each point.
        config: of the layer.
        gamma: of the layer.
        change: the root mean square of y − x relative to that of x, what the layer does to these features.
    """

    image: Array
    grid: Array
    statistics: MapStatistics
    positions: list[tuple[int, int]]
    config: SelfAttentionConfig
    gamma: float
    change: float


def attend_files(
    weights: Path,
    features: Path,
    image: Path,
    points: Sequence[tuple[int, int]],
    *,
    block: str | None = None,
    array: str | None = None,
    sample: int | None = None,
    layout: str = "channels_last",
) -> Attended:
    """The map of the layer in a canonical file, from the numpy definition.

    Args:
        weights: canonical file.
        features: the layer's input, as for `read_features`.
        image: the picture that the features were computed from.
        points: pixels (y, x) of the image.
        block: which layer of a file that holds several.
        array: as for `read_features`.
        sample: as for `read_features`.
        layout: as for `read_features`.

    Raises:
        ModuleNotFoundError: if what reads images is not installed.
        OSError: if a file cannot be read.
        ValueError: if files do not fit each other, or a point is outside the image.
    """
    config, params = _layer(weights, block)
    pixels = read_image(image)
    outside = [(y, x) for y, x in points if not (0 <= y < pixels.shape[0] and 0 <= x < pixels.shape[1])]
    if outside:
        raise ValueError(
            f"{image}: got the point{'s' if len(outside) > 1 else ''} {', '.join(f'{y},{x}' for y, x in outside)} outside "
            f"the image; expected y,x in pixels, y from 0 to {pixels.shape[0] - 1} and x from 0 to {pixels.shape[1] - 1}."
        )
    x = read_features(features, config, array=array, sample=sample, layout=layout)
    height, width = x.shape[:2]
    keys = config.key_grid(height, width)
    if height * width * keys[0] * keys[1] > LARGEST_MAP:
        raise ValueError(
            f"{features}: a map from {height}×{width} positions to {keys[0]}×{keys[1]} keys has more than {LARGEST_MAP} "
            "numbers; take features of a smaller image, or a crop."
        )
    params = {name: values.astype(np.float32) for name, values in params.items()}
    maps = x[None].astype(np.float32)
    attention = spec.attention_map(config, params, maps)[0]
    change = spec.forward(config, params, maps) - maps
    grid = unflatten(attention, height, width, kv_pool=config.kv_pool)
    return Attended(
        image=pixels,
        grid=grid,
        statistics=map_statistics(grid, kv_pool=config.kv_pool),
        positions=[position_of(point, pixels.shape[:2], (height, width)) for point in points],
        config=config,
        gamma=float(params["gamma"][0]),
        change=float(np.linalg.norm(change) / max(np.linalg.norm(maps), np.finfo(np.float32).tiny)),
    )


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
        path: .npy, or .npz; nothing in it is unpickled.
        config: of the layer, which says what C is.
        array: which array of an .npz with several.
        sample: which sample of a batch of several.
        layout: of the file, "channels_last" or "channels_first", with a batch axis or without.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it holds no such features.
    """
    features = _array(path, array)
    channel = -1 if layout == "channels_last" else -3
    axes = "(…, H, W, C)" if layout == "channels_last" else "(…, C, H, W)"
    received = f"{path}: got features of shape {features.shape} and dtype {features.dtype}; expected {axes}"
    if features.ndim not in (3, 4):
        raise ValueError(f"{received}, with a batch axis or without: its rank is {features.ndim}.")
    if not is_floating(features.dtype):
        raise ValueError(f"{received}, floating point.")
    if features.shape[channel] != config.channels:
        other = -3 if channel == -1 else -1
        flag = "channels_first" if channel == -1 else "channels_last"
        hint = (
            f"they are {flag}: pass --layout {flag}."
            if features.shape[other] == config.channels
            else "are they the input of this layer?"
        )
        raise ValueError(f"{received} with C = {config.channels}: {hint}")
    if features.ndim == 4:
        if sample is None and len(features) != 1:
            raise ValueError(
                f"{path}: holds a batch of {len(features)}; pass --sample, 0 to {len(features) - 1}."
            )
        chosen = 0 if sample is None else sample
        if not 0 <= chosen < len(features):
            raise ValueError(f"{path}: has no sample {chosen}; it holds {len(features)}, counted from 0.")
        features = features[chosen]
    elif sample is not None:
        raise ValueError(f"{path}: holds one sample of shape {features.shape}; pass no --sample.")
    if not np.isfinite(features).all():
        raise ValueError(f"{path}: the features hold NaN or infinity.")
    features = np.moveaxis(features, channel, -1)
    config.check_input((1, *features.shape), layer=str(path))
    return features


def read_image(path: Path) -> Array:
    """The pixels of a picture as they are stored, (height, width) or (height, width, 3), uint8.

    Args:
        path: any format that Pillow reads. Transparency is dropped, and orientation tags of cameras are not applied,
            as image loaders of training code do not apply them.

    Raises:
        ModuleNotFoundError: if Pillow is not installed.
        OSError: if the file cannot be read.
        ValueError: if it is not a picture.
    """
    require("selfattn attend", ["matplotlib", "PIL"], "viz")
    from PIL import Image, UnidentifiedImageError

    _check_is_file(path)
    try:
        with Image.open(path) as picture:
            grey = picture.mode in ("1", "L", "LA")
            return np.asarray(picture.convert("L" if grey else "RGB"))
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: is not a picture that can be read.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}") from error


def _layer(path: Path, block: str | None) -> tuple[SelfAttentionConfig, dict[str, Array]]:
    """What `load` gives; its errors in the words of the command."""
    try:
        return load(path, block=block)
    except ValueError as error:
        words = (
            str(error)
            .replace("pass block= one of", "pass --block, one of")
            .replace("pass no block", "pass no --block")
        )
        if path.is_file() and not _is_canonical(path):
            words += f" If it is a checkpoint, make a canonical file of it: selfattn port {path} FILE.safetensors --from …"
        raise ValueError(words) from error


def _is_canonical(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except safetensors.SafetensorError:
        return False


def _array(path: Path, name: str | None) -> Array:
    _check_is_file(path)
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            arrays = {"": content}
        else:
            with content as archive:
                chosen = archive.files if name is None else [name]
                # Only what is asked for is unpacked.
                arrays = {
                    key: archive[key] if key in chosen and len(chosen) == 1 else np.empty(0)
                    for key in archive.files
                }
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        # numpy's own words advise to unpickle.
        raise ValueError(
            f"{path}: cannot be read as .npy or .npz: it is damaged, another format, or holds Python objects, which are "
            "not unpickled; expected an array of numbers, as numpy.save writes it."
        ) from error
    if name is None and len(arrays) == 1:
        return next(iter(arrays.values()))
    if name is None:
        raise ValueError(
            f"{path}: holds {len(arrays)} arrays; pass --array, one of: {', '.join(arrays) or 'none'}."
        )
    if name not in arrays:
        held = "a single array: pass no --array" if "" in arrays else f"the arrays {', '.join(arrays)}"
        raise ValueError(f"{path}: has no array {name!r}; it holds {held}.")
    return arrays[name]


def _check_is_file(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, where a file is expected.")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
