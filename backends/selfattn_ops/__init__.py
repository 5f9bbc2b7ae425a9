"""Attention without a scale, in memory linear in N, for each array framework.

Import it for the framework that you use: `from selfattn_ops.torch import attend`, or `.jax`, or `.tensorflow`. This
package itself imports no framework.
"""

from selfattn_core import __version__

__all__ = ["__version__"]
