"""What Keras saves of a layer, under the keys that the porter reads in a file of it."""

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
    """The tensors that a `.weights.h5` of the layer alone has, and the variable that each comes from.

    Args:
        layer: any layer of Keras, built.
        where: what messages call it.

    Raises:
        PortError: if Keras cannot save it.

    Example:
        >>> layer = keras.layers.Dense(2)
        >>> layer.build((None, 3))
        >>> tensors, variables = stored(layer, "a dense layer")
        >>> list(tensors), variables["kernel"] is layer.kernel
        (['kernel', 'bias'], True)
    """
    tensors = _saved(layer, where)
    variables = layer.variables
    # Numbers that say whose they are; nothing is written into the variables.
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
        raise PortError(f"{where}: what Keras saves of it cannot be read: {error}") from error
    except Exception as error:
        raise PortError(f"{where}: Keras cannot save it: {type(error).__name__}: {error}") from error
