"""The Keras layer, on the framework of `KERAS_BACKEND`, through what Keras exports; each function writes the file of a form."""

from pathlib import Path
from typing import Any

import keras

from selfattn_keras import from_canonical
from tests.exports.cells import CONFIGS, SIZES, Form, params_of

_FRAMEWORK = keras.backend.backend()


def _model(form: Form) -> Any:
    config = CONFIGS[form.config]
    layer = from_canonical(config, params_of(form.config), block_size=form.block_size)
    x = keras.Input(_shape(form)[1:], batch_size=_shape(form)[0], name="x")
    outputs = layer(x, return_attention_scores=form.with_map)
    return keras.Model(x, dict(zip(("y", "map"), outputs, strict=True)) if form.with_map else {"y": outputs})


def _shape(form: Form) -> tuple[int | None, ...]:
    sizes = (None, None, None) if form.open else SIZES
    return (*sizes, CONFIGS[form.config].channels)


def _export(form: Form, path: Path, kind: str, **options: Any) -> None:
    signature = [keras.InputSpec(shape=_shape(form), dtype="float32", name="x")]
    options = {"input_signature": signature} | options
    _model(form).export(str(path), format=kind, verbose=False, **options)


def _keras(form: Form, path: Path) -> None:
    _model(form).save(path)


def _saved_model(form: Form, path: Path) -> None:
    options = {}
    if _FRAMEWORK == "jax" and form.open and form.config == "pooled":
        # JAX must be told that no side is below the window; Keras calls the open ones a and b.
        promised = [f"{side} >= 2" for side in "ab"]
        options["jax2tf_kwargs"] = {"polymorphic_constraints": promised, "with_gradient": False}
    _export(form, path, "tf_saved_model", **options)


def _onnx(form: Form, path: Path) -> None:
    _export(form, path, "onnx")


def _litert(form: Form, path: Path) -> None:
    options = {}
    if _FRAMEWORK == "tensorflow":
        import tensorflow as tf

        options["input_signature"] = [tf.TensorSpec(_shape(form), tf.float32, name="x")]
    _export(form, path, "litert", **options)


def _openvino(form: Form, path: Path) -> None:
    _export(form, path, "openvino")


def _torch(form: Form, path: Path) -> None:
    if not form.open:
        return _export(form, path, "torch")
    import torch

    # Two windows a side at least: of one PyTorch makes a constant.
    dynamic = {0: torch.export.Dim("b"), 1: torch.export.Dim("h", min=4), 2: torch.export.Dim("w", min=4)}
    traced = keras.InputSpec(shape=(3, 6, 8, CONFIGS[form.config].channels), dtype="float32")
    return _export(form, path, "torch", input_signature=[traced], dynamic_shapes=dynamic)


keras_tensorflow_keras = keras_jax_keras = keras_torch_keras = _keras
keras_tensorflow_saved_model = keras_jax_saved_model = _saved_model
keras_tensorflow_onnx = keras_jax_onnx = keras_torch_onnx = _onnx
keras_tensorflow_litert = keras_torch_litert = _litert
keras_tensorflow_openvino = keras_jax_openvino = keras_torch_openvino = _openvino
keras_torch_torch = _torch
