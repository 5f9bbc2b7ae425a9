"""The files that the processes of this example exchange, all in one folder.

| file | content |
|---|---|
| `attention.safetensors` | the attention layer as a canonical file, for `save` and `load` of every adapter |
| `network.safetensors` | the other layers as plain arrays, `NETWORK` below |
| `images.npy` | the held-out images (B, 8, 8, 1) |
| `<framework>.npy` | a framework's logits (B, 10) for these images |
| `<framework>.log` | the output of its process |
| `attention.png` | attention maps of three held-out images |
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

Array = NDArray[Any]

ATTENTION = "attention.safetensors"
NETWORK_FILE = "network.safetensors"
IMAGES = "images.npy"
PICTURE = "attention.png"

NETWORK: Mapping[str, tuple[int, ...]] = {
    "conv1.kernel": (3, 3, 1, 16),
    "conv1.bias": (16,),
    "conv2.kernel": (3, 3, 16, 32),
    "conv2.bias": (32,),
    "dense.kernel": (32, 10),
    "dense.bias": (10,),
}
"""Names and shapes in `network.safetensors`.

Kernels of convolutions are (height, width, C_in, C_out), and that of the dense layer is (C_in, C_out), as in Keras and Flax.
torch puts C_out first.
"""


def save_network(folder: Path, arrays: Mapping[str, Array]) -> None:
    """Write the layers other than attention."""
    # safetensors 0.8 stores the memory of a transposed array unchanged, which is the wrong order.
    contiguous = {name: np.ascontiguousarray(array) for name, array in _checked(arrays).items()}
    safetensors.numpy.save_file(contiguous, folder / NETWORK_FILE)


def load_network(folder: Path) -> dict[str, Array]:
    """The layers other than attention, by the names in `NETWORK`."""
    return _checked(safetensors.numpy.load_file(folder / NETWORK_FILE))


def logits_file(folder: Path, framework: str) -> Path:
    """The file of a framework's answer."""
    return folder / f"{framework}.npy"


def answer(score: Callable[[Path, Array], Array]) -> None:
    """The whole program of a framework's process, `python -m examples.digits.<model> FOLDER FRAMEWORK`.

    Args:
        score: maps the folder and the held-out images to their logits.
    """
    folder, framework = Path(sys.argv[1]), sys.argv[2]
    logits = score(folder, np.load(folder / IMAGES))
    np.save(logits_file(folder, framework), np.asarray(logits))


def _checked(arrays: Mapping[str, Array]) -> dict[str, Array]:
    shapes = {name: array.shape for name, array in arrays.items()}
    if shapes != NETWORK:
        raise ValueError(f"network.safetensors: got {shapes}; expected {dict(NETWORK)}.")
    return dict(arrays)
