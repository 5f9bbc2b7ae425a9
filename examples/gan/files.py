"""The files of a finished run, which the examples exchange, all in one folder.

| file | content |
|---|---|
| `attention.safetensors` | the attention layers as one canonical file with a block for each of `BLOCKS`, for `load` of every adapter |
| `networks.safetensors` | the other layers as plain arrays, `NETWORKS` below |
| `samples.npz` | `latents` and `labels`, the averaged generator's `images` from them, and the discriminator's `scores` of these |

A program that reads them into another framework first generates the images of `samples.npz` again.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from examples.gan.settings import CLASSES, LATENT, WIDTHS
from selfattn_core.files.writing import write_atomically

__all__ = [
    "ATTENTION",
    "BLOCKS",
    "NETWORKS",
    "Samples",
    "load_networks",
    "load_samples",
    "save_networks",
    "save_samples",
]

Array = NDArray[Any]

ATTENTION = "attention.safetensors"
BLOCKS = ("generator", "discriminator", "averaged")
"""The networks of a run. The last is the generator with averaged weights."""
_NETWORKS_FILE = "networks.safetensors"
_SAMPLES_FILE = "samples.npz"

_FIRST, _ATTENDED, _LAST = WIDTHS["first"], WIDTHS["attended"], WIDTHS["last"]


def _plain(name: str, *kernel: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.kernel": kernel, f"{name}.bias": kernel[-1:]}


def _normalised(name: str, *kernel: int) -> dict[str, tuple[int, ...]]:
    """A layer with spectral norm: its raw kernel, and the vectors of the power iteration."""
    return {
        **_plain(name, *kernel),
        f"{name}.u": kernel[-1:],
        f"{name}.v": kernel[:-1],
    }


def _generator(name: str) -> dict[str, tuple[int, ...]]:
    return {
        **_plain(f"{name}.dense", LATENT + CLASSES, 4 * 4 * _FIRST),
        **_plain(f"{name}.conv1", 3, 3, _FIRST, _ATTENDED),
        **_plain(f"{name}.conv2", 3, 3, _ATTENDED, _LAST),
        **_plain(f"{name}.conv3", 3, 3, _LAST, 1),
    }


NETWORKS: Mapping[str, tuple[int, ...]] = {
    **_generator("generator"),
    **_generator("averaged"),
    **_normalised("discriminator.conv1", 3, 3, 1, 32),
    **_normalised("discriminator.conv2", 3, 3, 32, 64),
    **_normalised("discriminator.conv3", 3, 3, 64, 64),
    **_normalised("discriminator.dense", 64, 1 + CLASSES),
}
"""Names and shapes in `networks.safetensors`: kernels (height, width, C_in, C_out) or (C_in, C_out).

The output of the generators' dense layer is a 4×4 map with the channels last.
"""


@dataclass(frozen=True)
class Samples:
    """The outputs of a checkpoint's networks.

    Args:
        latents: (B, LATENT).
        labels: (B,), int64.
        images: (B, 8, 8, 1).
        scores: (B,), of these images.
    """

    latents: Array
    labels: Array
    images: Array
    scores: Array


def save_networks(folder: Path, arrays: Mapping[str, Array]) -> None:
    """Write the layers other than attention. The file of an earlier run is replaced."""
    # safetensors 0.8 stores the memory of a transposed array unchanged, which is the wrong order.
    contiguous = {name: np.ascontiguousarray(array) for name, array in _checked(arrays).items()}
    write_atomically(folder / _NETWORKS_FILE, safetensors.numpy.save(contiguous), overwrite=True)


def load_networks(folder: Path) -> dict[str, Array]:
    """The layers other than attention, by the names in `NETWORKS`."""
    return _checked(safetensors.numpy.load_file(folder / _NETWORKS_FILE))


def save_samples(folder: Path, samples: Samples) -> None:
    """Write the outputs of the networks. The file of an earlier run is replaced."""
    content = io.BytesIO()
    np.savez(content, **vars(samples))
    write_atomically(folder / _SAMPLES_FILE, content.getvalue(), overwrite=True)


def load_samples(folder: Path) -> Samples:
    """The expected outputs of the networks."""
    with np.load(folder / _SAMPLES_FILE) as archive:
        return Samples(**archive)


def _checked(arrays: Mapping[str, Array]) -> dict[str, Array]:
    problems = [
        f"{name}: got {arrays[name].shape if name in arrays else 'nothing'}, expected {NETWORKS.get(name, 'nothing')}"
        for name in sorted(arrays.keys() | NETWORKS.keys())
        if name not in arrays or arrays[name].shape != NETWORKS.get(name)
    ]
    if problems:
        raise ValueError(f"{_NETWORKS_FILE}: " + "; ".join(problems) + ".")
    return dict(arrays)
