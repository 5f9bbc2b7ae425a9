"""Checkpoints of the originals as files, and outputs of theirs to compare with."""

from pathlib import Path

import numpy as np

from tests.porting.originals import ORIGINALS, C


def written(folder: Path, name: str, dtype="float32"):
    """An original's checkpoint as an `.npz`, and the original, whose tensors are those of the file."""
    original = ORIGINALS[name]()
    original.tensors = {
        key: value.astype(dtype) if value.dtype.kind == "f" else value
        for key, value in original.tensors.items()
    }
    path = folder / f"{name.replace(', ', '-').replace(' ', '-')}.npz"
    np.savez(path, **original.tensors)
    return path, original


def output(original, seed=5, dtype="float64"):
    """An input and the output (B, H, W, C) of the original, computed in float64 from its tensors as they are."""
    x = np.random.Generator(np.random.PCG64(seed)).standard_normal((2, 4, 6, C)).astype(dtype)
    local = {
        key.removeprefix(original.prefix): value.astype(np.float64)
        for key, value in original.tensors.items()
        if key.startswith(original.prefix)
    }
    if original.layout == "BCHW":
        return x, original.forward(local, x.astype(np.float64).transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    return x, original.forward(local, x.astype(np.float64))


def io_file(folder: Path, original, dtype="float32", spoil=0.0):
    """An `io.npz` in the original's layout; `spoil` is added to one element of y."""
    x, y = output(original, dtype=dtype)
    y = y.astype(dtype)
    y[1, 2, 3, 4] += spoil
    if original.layout == "BCHW":
        x, y = x.transpose(0, 3, 1, 2), y.transpose(0, 3, 1, 2)
    path = folder / "io.npz"
    np.savez(path, x=x, y=y)
    return path
