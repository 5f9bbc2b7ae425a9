"""Weights in from other people's checkpoints, and out to them, exactly or with a refusal that explains."""

from selfattn_core.porting.errors import PortError
from selfattn_core.porting.readers import TensorInfo, Tensors, open_tensors
from selfattn_core.porting.writers import write_tensors

__all__ = ["PortError", "TensorInfo", "Tensors", "open_tensors", "write_tensors"]
