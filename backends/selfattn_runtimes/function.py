"""The user's own function, given as module:function. It maps a numpy array x to y, or to y and the map."""

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfattn_core.verifying.artifact import Artifact, Tensor

__all__ = ["open_artifact"]


def open_artifact(path: str, *, input_name: str | None, output_names: tuple[str, ...]) -> Artifact:
    """Import a function.

    Args:
        path: "module:function".
        input_name: "x" or None.
        output_names: "y", "map" or none.

    Raises:
        TypeError: if it is not a function.
    """
    module, _, attribute = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{path} is {type(found).__name__}; expected a function from maps to maps")
    function = found
    names = output_names or ("y",)

    def run(x: NDArray[Any], _: str, asked: tuple[str, ...]) -> list[NDArray[Any]]:
        answered = function(x)
        arrays = answered if isinstance(answered, tuple | list) else (answered,)
        if len(arrays) < len(names):
            raise TypeError(f"{path} gives {len(arrays)} arrays; expected {' and '.join(names)}")
        by_name = {name: np.asarray(array) for name, array in zip(("y", "map"), arrays, strict=False)}
        return [by_name[name] for name in asked]

    return Artifact(
        (Tensor("x", "float32", None),), tuple(Tensor(name, "float32", None) for name in names), run, {}
    )
