"""Runtimes of exported layers, for `selfattn verify`. Each module runs one format and imports its runtime.

Every `open_artifact(path, *, input_name, output_names)` returns a `selfattn_core.verifying.artifact.Artifact`. The names
select a part of a network by its first and last tensors, if the format supports that. None and () select the whole. This
package itself imports no runtime.
"""

from selfattn_core import __version__

__all__ = ["__version__"]
