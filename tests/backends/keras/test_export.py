"""What Keras exports, reloaded and run without it at sizes that it has not seen; and what it refuses to export."""

import keras
import numpy as np
import pytest

from selfattn_core import SelfAttentionConfig, spec
from selfattn_keras import from_canonical
from tests.support import FLAT, OUTPUT, assert_near, designed, wide

FRAMEWORK = keras.backend.backend()
POOLED = SelfAttentionConfig(12, 3, 5, out_projection=True, kv_pool=2)
SIZES = [(3, 7, 9), (2, 5, 4), (1, 6, 8)]

# Exported with the map and without, in either data format.
EXPORTED = [
    pytest.param(FLAT, "channels_last", False, id="flat"),
    pytest.param(POOLED, "channels_first", True, id="pooled, with its map"),
]


def model_of(config, layout, scores, *, batch=None, height=None, width=None, block_size=None):
    layer = from_canonical(
        config, designed(config, shape=SIZES[0])[0], data_format=layout, block_size=block_size
    )
    sizes = (
        (height, width, config.channels) if layout == "channels_last" else (config.channels, height, width)
    )
    x = keras.Input(sizes, batch_size=batch, name="x")
    outputs = layer(x, return_attention_scores=scores)
    return keras.Model(x, dict(zip(("y", "A"), outputs, strict=True)) if scores else {"y": outputs})


def assert_right(run, config, layout, scores, sizes=SIZES):
    """`run(x)` is {"y": …} or {"y": …, "A": …} in numpy."""
    params, whole, _ = designed(config, shape=SIZES[0])
    for batch, height, width in sizes:
        x = whole[:batch, :height, :width]
        got = run(np.ascontiguousarray(x if layout == "channels_last" else x.transpose(0, 3, 1, 2)))
        assert set(got) == ({"y", "A"} if scores else {"y"})
        y = got["y"] if layout == "channels_last" else got["y"].transpose(0, 2, 3, 1)
        wanted = [(y, spec.forward(config, wide(params), wide(x)))]
        if scores:
            wanted.append((got["A"], spec.attention_map(config, wide(params), wide(x))))
        for array, want in wanted:
            assert_near(array, want, OUTPUT)


# Keras passes it to JAX's converter, which will drop it.
pytestmark = pytest.mark.filterwarnings("ignore:The `native_serialization` parameter:DeprecationWarning")


@pytest.mark.skipif(FRAMEWORK not in ("tensorflow", "jax"), reason="not on PyTorch")
@pytest.mark.parametrize(("config", "layout", "scores"), EXPORTED)
def test_saved_model(config, layout, scores, tmp_path):
    import tensorflow as tf

    options = {}
    if FRAMEWORK == "jax" and config.kv_pool > 1:
        # JAX must be told that no size is below the window; Keras calls the open ones a and b. The converter forgets
        # it for the gradients.
        promised = [f"{size} >= {config.kv_pool}" for size in "ab"]
        options["jax2tf_kwargs"] = {"polymorphic_constraints": promised, "with_gradient": False}
    model_of(config, layout, scores).export(tmp_path / "model", verbose=False, **options)
    loaded = tf.saved_model.load(tmp_path / "model")
    assert_right(
        lambda x: {name: array.numpy() for name, array in loaded.serve(tf.constant(x)).items()},
        config,
        layout,
        scores,
    )


@pytest.mark.skipif(FRAMEWORK not in ("tensorflow", "jax"), reason="not on PyTorch")
def test_the_map_of_a_saved_model_that_has_none_is_refused(tmp_path):
    import tensorflow as tf

    model_of(FLAT, "channels_last", scores=False).export(tmp_path / "model", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "model")
    with pytest.raises(TypeError, match="return_attention_scores"):
        loaded.serve(tf.ones((1, 2, 3, 11)), return_attention_scores=True)


@pytest.mark.skipif(FRAMEWORK not in ("tensorflow", "torch"), reason="not on JAX")
# Keras mends tf2onnx, which names what numpy 2 has dropped, and calls PyTorch's older exporter, which is deprecated.
@pytest.mark.filterwarnings(
    "ignore:In the future `np.object` will be defined:FutureWarning",
    "ignore::DeprecationWarning",
    "ignore:(?s).*might cause the trace to be incorrect:Warning",
)
@pytest.mark.parametrize(("config", "layout", "scores"), EXPORTED)
def test_onnx(config, layout, scores, tmp_path):
    import onnxruntime

    path = str(tmp_path / "model.onnx")
    model = model_of(config, layout, scores)
    sizes = SIZES
    if FRAMEWORK == "torch" and config.kv_pool > 1:
        # PyTorch traces with every open size 1, which is less than a window.
        sizes = SIZES[:1]
    shape = (sizes[0] if len(sizes) == 1 else (None, None, None)) + (config.channels,)
    shape = shape if layout == "channels_last" else (shape[0], shape[3], *shape[1:3])
    signature = [keras.InputSpec(shape=shape, dtype="float32", name="x")]
    model.export(path, format="onnx", verbose=False, input_signature=signature)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert_right(
        lambda x: {"y" if a.ndim == 4 else "A": a for a in session.run(None, {given.name: x})},
        config,
        layout,
        scores,
        sizes,
    )


@pytest.mark.skipif(FRAMEWORK != "tensorflow", reason="on TensorFlow alone")
# TensorFlow's own interpreter, which is to move to a package of its own.
@pytest.mark.filterwarnings("ignore:(?s).*tf.lite.Interpreter is deprecated:UserWarning")
@pytest.mark.parametrize(
    ("config", "layout", "scores", "sizes", "block_size"),
    [
        # Blocks of a number of positions that is not known are a loop, which LiteRT runs in its Flex delegate only.
        pytest.param(FLAT, "channels_last", False, SIZES[:1], None, id="flat, of fixed sizes"),
        # Six and a rest. With the loop's begin in 64 bits and the size in 32, this was NaN, or rows from elsewhere.
        pytest.param(FLAT, "channels_last", False, SIZES[:1], 10, id="flat, of fixed sizes, in blocks"),
        pytest.param(POOLED, "channels_first", True, SIZES, None, id="pooled, with its map"),
    ],
)
def test_litert(config, layout, scores, sizes, block_size, tmp_path):
    import tensorflow as tf

    path = str(tmp_path / "model.tflite")
    batch, height, width = sizes[0] if len(sizes) == 1 else (None, None, None)
    model = model_of(config, layout, scores, batch=batch, height=height, width=width, block_size=block_size)
    shape = model.inputs[0].shape
    signature = [tf.TensorSpec(shape, tf.float32, name="x")]
    model.export(path, format="litert", verbose=False, input_signature=signature)
    assert_right(
        lambda x: tf.lite.Interpreter(path).get_signature_runner()(x=x), config, layout, scores, sizes
    )


@pytest.mark.skipif(FRAMEWORK != "torch", reason="on PyTorch alone")
@pytest.mark.parametrize(("config", "layout", "scores"), EXPORTED)
def test_exported_program(config, layout, scores, tmp_path):
    import torch

    path = str(tmp_path / "model.pt2")
    # Two windows a side at least: of one PyTorch makes a constant.
    dims = {axis: torch.export.Dim(axis.lower(), min=4) for axis in "HW"}
    dims["B"] = torch.export.Dim("b")
    axes = "BHWC" if layout == "channels_last" else "BCHW"
    dynamic = {index: dims[axis] for index, axis in enumerate(axes) if axis != "C"}
    # Keras would trace with a map of 2×2, of which pooling makes the constant 1.
    sizes = dict(zip("BHWC", (2, 6, 8, config.channels), strict=True))
    traced = keras.InputSpec(shape=tuple(sizes[axis] for axis in axes), dtype="float32")
    model_of(config, layout, scores).export(
        path, format="torch", verbose=False, input_signature=[traced], dynamic_shapes=dynamic
    )
    run = torch.export.load(path).module()
    assert_right(
        lambda x: {name: array.detach().numpy() for name, array in run(torch.tensor(x)).items()},
        config,
        layout,
        scores,
    )


@pytest.mark.parametrize(
    ("format", "message"),
    {
        "tensorflow": [("torch", "requires PyTorch backend")],
        "jax": [
            ("torch", "requires PyTorch backend"),
            ("litert", "requires TensorFlow or PyTorch backend"),
            ("onnx", "jax2onnx"),
        ],
        "torch": [("tf_saved_model", "torch_xla"), ("litert", "litert-torch")],
    }[FRAMEWORK],
)
def test_what_keras_does_not_export_from_here(format, message, tmp_path):
    suffix = {"torch": ".pt2", "litert": ".tflite"}.get(format, "")
    model = model_of(FLAT, "channels_last", scores=False)
    x = np.ones((2, 3, 4, 11), "float32")
    model(x)
    with pytest.raises((ValueError, ImportError), match=message):
        model.export(
            str(tmp_path / f"model{suffix}"),
            format=format,
            verbose=False,
            input_signature=[keras.InputSpec(shape=x.shape, dtype="float32")],
        )
