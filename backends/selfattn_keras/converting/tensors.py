"""The tensors of a Keras layer, by the keys of its weights file."""

from pathlib import Path
from typing import Any

import keras
import numpy as np

from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats.keras import open_h5
from selfattn_core.porting.formats.scratch import scratch_folder
from selfattn_core.porting.formats.tensors import Entry, Tensors

__all__ = ["stored"]


def stored(layer: Any, where: str) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a `.weights.h5` file of the layer alone, and the variable of each tensor.

    Args:
        layer: any built Keras layer.
        where: name of the layer in messages.

    Raises:
        PortError: if Keras cannot save the layer.

    Example:
        >>> layer = keras.layers.Dense(2)
        >>> layer.build((None, 3))
        >>> tensors, variables = stored(layer, "a dense layer")
        >>> list(tensors), variables["kernel"] is layer.kernel
        (['kernel', 'bias'], True)
    """
    tensors = _saved(layer, where)
    variables = layer.variables
    # The saved values identify their variables. Nothing is written into the variables.
    marked = [(each, np.full(each.shape, place, np.float32)) for place, each in enumerate(variables)]
    with keras.StatelessScope() as scope:
        for each, number in marked:
            scope.add_update((each, keras.ops.convert_to_tensor(number)))
        marks = _saved(layer, where)
    owners = {}
    for key in tensors:
        numbers = marks.read(key)
        place = int(numbers.flat[0]) if numbers.size else -1
        if 0 <= place < len(variables) and (numbers == place).all():
            owners[key] = variables[place]
    return tensors, owners


def _saved(layer: Any, where: str) -> Tensors:
    try:
        with scratch_folder() as folder:
            path = folder / "layer.weights.h5"
            keras.saving.save_weights(layer, str(path))
            with open_h5(path) as read:
                arrays = {key: read.read(key) for key in read}
                entries = {key: Entry(info, arrays[key].copy) for key, info in read.items()}
                return Tensors(Path(where), "keras", entries, read.metadata, pools=read.pools)
    except PortError as error:
        raise PortError(f"{where}: Keras saves it in a form that cannot be read: {error}") from error
    except Exception as error:
        raise PortError(f"{where}: Keras cannot save it: {type(error).__name__}: {error}") from error
