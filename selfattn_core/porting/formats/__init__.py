"""Opens checkpoints of every format as a read-only mapping. Nothing in them is executed, and values are read one by one."""

from selfattn_core.porting.formats.open import open_tensors
from selfattn_core.porting.formats.tensors import TensorInfo, Tensors

__all__ = ["TensorInfo", "Tensors", "open_tensors"]
