"""The formats of checkpoints, one line a file; a new format is a file here and a line there."""

from selfattn_core.porting.formats import keras, msgpack, npz, orbax, safetensors, tensorflow, torch
from selfattn_core.porting.formats.format import Format

__all__ = ["FORMATS"]

FORMATS: tuple[Format, ...] = (
    *safetensors.FORMATS,
    *torch.FORMATS,
    *keras.FORMATS,
    # Archives of torch and of Keras may hold arrays of numpy too, so their signs are looked for first.
    *npz.FORMATS,
    *msgpack.FORMATS,
    *orbax.FORMATS,
    *tensorflow.FORMATS,
)
"""In the order in which their signs are looked for."""
