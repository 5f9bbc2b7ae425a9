"""SAGAN-style 2-D self-attention, defined once in numpy. This package imports no framework."""

from selfattn_core.config import SelfAttentionConfig
from selfattn_core.params import init_params, parameter_table
from selfattn_core.weights import load, save, save_blocks

__all__ = [
    "SelfAttentionConfig",
    "__version__",
    "init_params",
    "load",
    "parameter_table",
    "save",
    "save_blocks",
]

__version__ = "0.1.0"
