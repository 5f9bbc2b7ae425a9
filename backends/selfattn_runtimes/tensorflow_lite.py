"""LiteRT files (`.tflite`), run by the interpreter that comes with TensorFlow."""

import tensorflow as tf

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
    return opened(tf.lite.Interpreter(path), {"tensorflow": tf.__version__})
