"""SAGAN-style 2-D self-attention, defined once in numpy; this package imports no framework."""

from selfattn_core.config import SelfAttentionConfig
from selfattn_core.params import init_params, parameter_table

__all__ = ["SelfAttentionConfig", "__version__", "init_params", "parameter_table"]

__version__ = "0.1.0"
