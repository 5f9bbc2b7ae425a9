"""The interpreter of LiteRT files, from either of the packages that contain it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfattn_core.verifying.artifact import Artifact, Tensor

__all__ = ["opened"]


def opened(interpreter: Any, versions: Mapping[str, str]) -> Artifact:
    """A file that an interpreter has loaded.

    Args:
        interpreter: interpreter of ai-edge-litert or TensorFlow.
        versions: version of that package.
    """
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    index = {each["name"]: each["index"] for each in (*inputs, *outputs)}
    interpreter.allocate_tensors()

    def run(x: NDArray[Any], name: str, names: tuple[str, ...]) -> list[NDArray[Any]]:
        details = next(each for each in interpreter.get_input_details() if each["name"] == name)
        if tuple(details["shape"]) != x.shape:
            interpreter.resize_tensor_input(index[name], x.shape, strict=True)
            interpreter.allocate_tensors()
        interpreter.set_tensor(index[name], np.ascontiguousarray(x))
        interpreter.invoke()
        # A copy, because the next call overwrites the interpreter's memory.
        return [np.array(interpreter.get_tensor(index[each])) for each in names]

    formats = {np.dtype(each["dtype"]).name for each in interpreter.get_tensor_details()}
    return Artifact(
        tuple(_tensor(each) for each in inputs),
        tuple(_tensor(each) for each in outputs),
        run,
        versions,
        frozenset(formats & {"float16", "bfloat16", "float32", "int8"}),
    )


def _tensor(details: Mapping[str, Any]) -> Tensor:
    signature = details.get("shape_signature", details["shape"])
    sizes = tuple(None if size < 0 else int(size) for size in signature)
    return Tensor(details["name"], np.dtype(details["dtype"]).name, sizes)
