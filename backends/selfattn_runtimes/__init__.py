"""Runtimes of exported layers, for `selfattn verify`: each module runs one format, and imports its runtime; this package imports none.

Every `open_artifact(path, *, input_name, output_names)` gives a `selfattn_core.verifying.artifact.Artifact`. The names
say where a part of a network begins and ends, for the containers of which a part can be run; None and () mean the whole.
"""

from selfattn_core import __version__

__all__ = ["__version__"]
