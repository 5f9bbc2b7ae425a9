"""The table of all formats. To add a format, add a file to this folder and a line to this table."""

from selfattn_core.porting.formats import keras, msgpack, npz, orbax, safetensors, tensorflow, torch
from selfattn_core.porting.formats.format import Format

__all__ = ["FORMATS"]

FORMATS: tuple[Format, ...] = (
    *safetensors.FORMATS,
    *torch.FORMATS,
    *keras.FORMATS,
    # Archives of PyTorch and Keras may contain numpy arrays too, so they are tried first.
    *npz.FORMATS,
    *msgpack.FORMATS,
    *orbax.FORMATS,
    *tensorflow.FORMATS,
)
"""The formats, in the order in which they are tried."""
