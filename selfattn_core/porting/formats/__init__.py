"""Checkpoints of every format as one read-only mapping; nothing in them is executed, and little is read before it is asked for."""

from selfattn_core.porting.formats.open import open_tensors
from selfattn_core.porting.formats.tensors import TensorInfo, Tensors

__all__ = ["TensorInfo", "Tensors", "open_tensors"]
