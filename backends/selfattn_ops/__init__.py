"""The memory-linear core of the layer, once per array framework; importing this package imports none of them.

Import the one you use: `from selfattn_ops.torch import attend`, or `.jax`, or `.tensorflow`.
"""

from selfattn_core import __version__

__all__ = ["__version__"]
