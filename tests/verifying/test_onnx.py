"""ONNX files, made by hand and so by no exporter: alone, inside a network, in other formats, damaged."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from selfattn_core import SelfAttentionConfig, save
from selfattn_core.conformance.cases.case import Case
from selfattn_core.conformance.cases.inputs import inputs
from selfattn_core.verifying import VerifyError, verify

CONFIG = SelfAttentionConfig(16, qk_channels=3)


@pytest.fixture
def weights(tmp_path) -> Path:
    path = tmp_path / "layer.safetensors"
    save(path, CONFIG, params())
    return path


def params():
    return inputs(Case("", "forward", "", CONFIG), "float32").params


def layer(dtype=np.float32, *, transposed: bool = False) -> tuple[list, list]:
    """Nodes from `x` (B, H, W, C) to `y` and `A`, and their weights."""
    constants = {name.replace(".", "_"): array.astype(dtype) for name, array in params().items()}
    constants["rows"] = np.array([0, -1, CONFIG.channels])
    nodes = [
        helper.make_node("Reshape", ["x", "rows"], ["flat"]),
        helper.make_node("Shape", ["x"], ["shape"]),
    ]
    for role in ("query", "key", "value"):
        nodes += [
            helper.make_node("MatMul", ["flat", f"{role}_kernel"], [f"{role}_product"]),
            helper.make_node("Add", [f"{role}_product", f"{role}_bias"], [role]),
        ]
    nodes += [
        helper.make_node("Transpose", ["key"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["query", "turned"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["A"], axis=1 if transposed else 2),
        helper.make_node("MatMul", ["A", "value"], ["attended"]),
        helper.make_node("Mul", ["attended", "gamma"], ["scaled"]),
        helper.make_node("Add", ["scaled", "flat"], ["sum"]),
        helper.make_node("Reshape", ["sum", "shape"], ["y"]),
    ]
    return nodes, [numpy_helper.from_array(array, name) for name, array in constants.items()]


def written(
    path: Path, nodes: list, constants: list, *, feeds=(("x", ("B", "H", "W", 16)),), gives=None
) -> Path:
    dtype = (
        TensorProto.FLOAT16
        if any(each.data_type == TensorProto.FLOAT16 for each in constants)
        else TensorProto.FLOAT
    )
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in feeds],
        [
            helper.make_tensor_value_info(name, dtype, shape)
            for name, shape in (gives or (("y", ("B", "H", "W", 16)), ("A", ("B", "N", "M"))))
        ],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, path)
    return path


def test_a_right_file_and_its_map(weights, tmp_path):
    report = verify(written(tmp_path / "layer.onnx", *layer()), weights, size=(4, 7))
    assert report.passed
    assert report.with_map
    assert report.layout == "channels_last"
    assert report.runtime == "onnxruntime"


def test_a_softmax_over_the_wrong_axis(weights, tmp_path):
    report = verify(written(tmp_path / "layer.onnx", *layer(transposed=True)), weights, size=(4, 7))
    assert not report.passed
    assert report.diagnosis[0].startswith("softmax over queries")


def test_a_file_in_16_bits_is_held_to_them(weights, tmp_path):
    path = written(tmp_path / "layer.onnx", *layer(np.float16))
    report = verify(path, weights, size=(4, 7))
    assert (report.precision, report.why) == ("float16", "the file takes float16")
    assert report.passed
    assert not verify(path, weights, size=(4, 7), precision="float32").passed


def test_the_layer_inside_a_network(weights, tmp_path):
    nodes, constants = layer()
    around = [
        helper.make_node("Relu", ["image"], ["x"]),
        *nodes,
        helper.make_node("Tanh", ["y"], ["z"]),
    ]
    path = written(
        tmp_path / "network.onnx",
        around,
        constants,
        feeds=(("image", (2, 4, 7, 16)),),
        gives=(("z", (2, 4, 7, 16)),),
    )
    whole = verify(path, weights)
    assert not whole.passed
    assert verify(path, weights, input_name="x", output_name="y").passed
    with pytest.raises(VerifyError, match="absent"):
        verify(path, weights, input_name="absent", output_name="y")


def test_a_part_that_needs_more_than_its_input(weights, tmp_path):
    nodes, constants = layer()
    around = [helper.make_node("Relu", ["image"], ["x"]), *nodes]
    around[2] = helper.make_node("Shape", ["image"], ["shape"])
    path = written(
        tmp_path / "network.onnx",
        around,
        constants,
        feeds=(("image", (2, 4, 7, 16)),),
        gives=(("y", (2, 4, 7, 16)),),
    )
    with pytest.raises(VerifyError, match="also needs image, perhaps because of open sizes"):
        verify(path, weights, input_name="x", output_name="y")


def test_two_inputs(weights, tmp_path):
    nodes, constants = layer()
    kept = [each for each in constants if each.name != "gamma"]
    path = written(tmp_path / "layer.onnx", nodes, kept, feeds=(("x", (2, 4, 7, 16)), ("gamma", (1,))))
    with pytest.raises(VerifyError) as caught:
        verify(path, weights)
    assert "it takes 2 inputs; expected one" in str(caught.value)
    assert "gamma float32 (1)" in str(caught.value)


def test_weights_of_another_config(tmp_path):
    other = SelfAttentionConfig(24)
    save(tmp_path / "other.safetensors", other, inputs(Case("", "forward", "", other), "float32").params)
    with pytest.raises(VerifyError, match="has no axis of 24 channels, which the weights are for"):
        verify(written(tmp_path / "layer.onnx", *layer()), tmp_path / "other.safetensors")


def test_a_damaged_file(weights, tmp_path):
    path = written(tmp_path / "layer.onnx", *layer())
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(VerifyError, match=r"layer\.onnx: onnxruntime does not open it"):
        verify(path, weights)


def test_outputs_that_could_be_y(weights, tmp_path):
    nodes, constants = layer()
    nodes.append(helper.make_node("Neg", ["y"], ["minus"]))
    shape = ("B", "H", "W", 16)
    path = written(tmp_path / "layer.onnx", nodes, constants, gives=(("y", shape), ("minus", shape)))
    with pytest.raises(VerifyError, match="several outputs could be y; name it as output"):
        verify(path, weights)
    assert verify(path, weights, output_name="y", size=(4, 7)).passed
    assert not verify(path, weights, output_name="minus", size=(4, 7)).passed
