"""The Flax NNX layer through JAX's exporters; each writes the file of a form."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from selfattn_flax import from_canonical
from tests.exports.cells import CONFIGS, SIZES, Form, params_of


def _function(form: Form) -> Callable[[Any], Any]:
    layer = from_canonical(CONFIGS[form.config], params_of(form.config), block_size=form.block_size)
    graph, state = nnx.split(layer)

    def with_map(x: Any) -> Any:
        y, sown = nnx.capture(nnx.merge(graph, state), nnx.Intermediate)(x, sow_weights=True)
        return y, sown["attention_weights"][0]

    return with_map if form.with_map else layer


def _shape(form: Form) -> tuple[Any, ...]:
    # JAX must be told that no side is below the window.
    sizes = jax.export.symbolic_shape("b, h, w", constraints=["h >= 2", "w >= 2"]) if form.open else SIZES
    return (*sizes, CONFIGS[form.config].channels)


def jax_export(form: Form, path: Path) -> None:
    from jax import export

    x = jax.ShapeDtypeStruct(_shape(form), jnp.float32)
    path.write_bytes(export.export(jax.jit(_function(form)))(x).serialize())


def _tensorflow(form: Form) -> Any:
    import tensorflow as tf
    from jax.experimental import jax2tf

    function = _function(form)
    named = (lambda x: dict(zip(("y", "map"), function(x), strict=True))) if form.with_map else function
    converted = jax2tf.convert(
        named,
        polymorphic_shapes=["b, h, w, _"] if form.open else None,
        polymorphic_constraints=["h >= 2", "w >= 2"] if form.open else (),
        with_gradient=False,
    )
    sizes = (None, None, None) if form.open else SIZES
    x = tf.TensorSpec((*sizes, CONFIGS[form.config].channels), tf.float32, name="x")
    return tf.function(converted, autograph=False, input_signature=[x])


def saved_model(form: Form, path: Path) -> None:
    import tensorflow as tf

    module = tf.Module()
    module.serve = _tensorflow(form)
    tf.saved_model.save(module, str(path), signatures=module.serve)


def orbax_export(form: Form, path: Path) -> None:
    import tensorflow as tf
    from orbax.export import ExportManager, JaxModule, ServingConfig

    function = _function(form)

    def named(_: Any, x: Any) -> Any:
        return dict(zip(("y", "map"), function(x), strict=True)) if form.with_map else {"y": function(x)}

    module = JaxModule(
        {},
        named,
        input_polymorphic_shape="b, h, w, _" if form.open else None,
        jax2tf_kwargs={"polymorphic_constraints": ["h >= 2", "w >= 2"]} if form.open else None,
    )
    sizes = (None, None, None) if form.open else SIZES
    x = tf.TensorSpec((*sizes, CONFIGS[form.config].channels), tf.float32, name="x")
    ExportManager(module, [ServingConfig("serving_default", input_signature=[x])]).save(str(path))


def onnx(form: Form, path: Path) -> None:
    import jax2onnx

    sizes = ("B", "H", "W") if form.open else SIZES
    shape = (*sizes, CONFIGS[form.config].channels)
    jax2onnx.to_onnx(_function(form), [shape], return_mode="file", output_path=str(path))
