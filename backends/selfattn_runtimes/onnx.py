"""ONNX files, run by ONNX Runtime on the CPU."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx.helper import tensor_dtype_to_np_dtype

from selfattn_core.verifying.artifact import Artifact, Tensor

__all__ = ["open_artifact"]

_QUANTISED = ("QLinear", "DequantizeLinear", "ConvInteger", "MatMulInteger")


def open_artifact(path: str, *, input_name: str | None, output_names: tuple[str, ...]) -> Artifact:
    """Open a file, or the part of it between two tensors.

    Args:
        path: path of the file.
        input_name: name of the tensor that is fed; by default the graph's own input.
        output_names: names of the tensors that are read; by default the graph's own outputs.

    Raises:
        ValueError: if these tensors do not exist, or if the part between them needs further inputs.
    """
    model = onnx.load(path)
    onnx.checker.check_model(path)
    source: Any = path
    if _is_part(model, input_name, output_names):
        source = _part(model, input_name, output_names).SerializeToString()
    options = onnxruntime.SessionOptions()
    # Log errors only, because warnings about a graph concern its exporter.
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def run(x: NDArray[Any], name: str, outputs: tuple[str, ...]) -> list[NDArray[Any]]:
        return list(session.run(list(outputs), {name: x}))

    return Artifact(
        tuple(_tensor(each) for each in session.get_inputs()),
        tuple(_tensor(each) for each in session.get_outputs()),
        run,
        {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__},
        frozenset(_formats(model)),
    )


def _is_part(model: Any, input_name: str | None, output_names: tuple[str, ...]) -> bool:
    inputs = {each.name for each in model.graph.input}
    outputs = {each.name for each in model.graph.output}
    return (input_name is not None and input_name not in inputs) or not outputs.issuperset(output_names)


def _part(model: Any, input_name: str | None, output_names: tuple[str, ...]) -> Any:
    """The graph between two tensors."""
    start = input_name or model.graph.input[0].name
    part = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(model)).extract_model(
        [start], list(output_names) or [model.graph.output[0].name]
    )
    made = {name for node in part.graph.node for name in node.output}
    made |= {start, "", *(each.name for each in part.graph.initializer)}
    needed = {name for node in part.graph.node for name in node.input} - made
    if needed:
        raise ValueError(
            f"the part between {start} and its outputs also needs {', '.join(sorted(needed))}, perhaps because of open sizes: export "
            "the network with fixed sizes, or the layer alone."
        )
    return part


def _formats(model: Any) -> set[str]:
    """The dtypes of the weights. Integers belong to shapes and axes, unless something is quantised."""
    constants = [
        attribute.t
        for node in model.graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.HasField("t")
    ]
    weights = [each for each in (*model.graph.initializer, *constants) if each.dims]
    stored = {np.dtype(tensor_dtype_to_np_dtype(each.data_type)).name for each in weights}
    quantised = any(node.op_type.startswith(_QUANTISED) for node in model.graph.node)
    return {dtype for dtype in stored if "float" in dtype} | ({"int8"} if quantised else set())


def _tensor(given: Any) -> Tensor:
    dtype = {"tensor(float)": "float32", "tensor(double)": "float64"}.get(
        given.type, given.type.removeprefix("tensor(").removesuffix(")")
    )
    sizes = tuple(size if isinstance(size, int) else None for size in given.shape)
    return Tensor(given.name, dtype, sizes)
