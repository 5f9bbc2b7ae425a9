"""Files of `jax.export`, written by `Exported.serialize()`."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from numpy.typing import NDArray

from selfattn_core.verifying.artifact import Artifact, Tensor

__all__ = ["open_artifact"]


def open_artifact(path: str, *, input_name: str | None, output_names: tuple[str, ...]) -> Artifact:
    """Open a file.

    Args:
        path: path of the file.
        input_name: name of the input, "input 0" and so on. The whole function is run.
        output_names: names of outputs, "output 0" and so on. The whole function is run.
    """
    exported = export.deserialize(bytearray(Path(path).read_bytes()))
    inputs = [_tensor(f"input {number}", aval) for number, aval in enumerate(exported.in_avals)]
    outputs = [_tensor(f"output {number}", aval) for number, aval in enumerate(exported.out_avals)]

    def run(x: NDArray[Any], _: str, names: tuple[str, ...]) -> list[NDArray[Any]]:
        args, kwargs = jax.tree.unflatten(exported.in_tree, [jax.numpy.asarray(x)])
        answered = jax.tree.leaves(exported.call(*args, **kwargs))
        by_name = {each.name: value for each, value in zip(outputs, answered, strict=True)}
        return [np.asarray(by_name[name]) for name in names]

    return Artifact(tuple(inputs), tuple(outputs), run, {"jax": jax.__version__})


def _tensor(name: str, aval: Any) -> Tensor:
    shape = tuple(size if isinstance(size, int) else None for size in aval.shape)
    return Tensor(name, np.dtype(aval.dtype).name, shape)
