"""LiteRT files (`.tflite`), run by ai-edge-litert."""

from importlib.metadata import version

from ai_edge_litert.interpreter import Interpreter

from selfattn_core.verifying.artifact import Artifact
from selfattn_runtimes.interpreter import opened

__all__ = ["open_artifact"]


def open_artifact(path: str, *, input_name: str | None, output_names: tuple[str, ...]) -> Artifact:
    """Open a file.

    Args:
        path: path of the file.
        input_name: name of the input. The whole file is run.
        output_names: names of outputs. The whole file is run.
    """
    return opened(Interpreter(path), {"ai-edge-litert": version("ai-edge-litert")})
