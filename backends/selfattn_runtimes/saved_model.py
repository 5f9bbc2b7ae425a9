"""TensorFlow's SavedModel folders, run by their serving signature."""

from typing import Any

import tensorflow as tf
from numpy.typing import NDArray

from selfattn_core.verifying.artifact import Artifact, Tensor

__all__ = ["open_artifact"]

_SIGNATURE = "serving_default"


def open_artifact(path: str, *, input_name: str | None, output_names: tuple[str, ...]) -> Artifact:
    """Open a folder.

    Args:
        path: path of the folder.
        input_name: name of the signature's input. The whole signature is run.
        output_names: names of its outputs. The whole signature is run.

    Raises:
        ValueError: if there is no signature, or there are several without `serving_default`.
    """
    loaded = tf.saved_model.load(path)
    signatures = dict(loaded.signatures)
    if _SIGNATURE not in signatures and len(signatures) != 1:
        raise ValueError(
            f"it has the signatures {', '.join(signatures) or 'none'}; expected {_SIGNATURE}, or only one: pass signatures= to "
            "tf.saved_model.save, or use the layer's export(path)."
        )
    function = signatures.get(_SIGNATURE) or next(iter(signatures.values()))
    specs = function.structured_input_signature[1]

    def run(x: NDArray[Any], name: str, names: tuple[str, ...]) -> list[NDArray[Any]]:
        answered = function(**{name: tf.constant(x)})
        return [answered[each].numpy() for each in names]

    return Artifact(
        tuple(_tensor(name, spec) for name, spec in specs.items()),
        tuple(_tensor(name, spec) for name, spec in function.structured_outputs.items()),
        run,
        {"tensorflow": tf.__version__},
        frozenset(variable.dtype.base_dtype.name for variable in function.variables),
    )


def _tensor(name: str, spec: Any) -> Tensor:
    shape = None if spec.shape.rank is None else tuple(spec.shape.as_list())
    return Tensor(name, spec.dtype.name, shape)
