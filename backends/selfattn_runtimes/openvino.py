"""OpenVINO files (`.xml`), and ONNX files run by OpenVINO, on the CPU in float32."""

from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from selfattn_core.verifying.artifact import Artifact, Tensor

__all__ = ["open_artifact"]


def open_artifact(path: str, *, input_name: str | None, output_names: tuple[str, ...]) -> Artifact:
    """Open a file, or the part of it between two tensors.

    Args:
        path: path of the file.
        input_name: name of the tensor that is fed; by default the network's own input.
        output_names: names of the tensors that are read; by default the network's own outputs.
    """
    core = openvino.Core()
    model = core.read_model(path)
    if not _own_names(model).issuperset(name for name in (input_name, *output_names) if name is not None):
        model = _part(model, input_name, output_names)
    by_default = core.get_property("CPU", "INFERENCE_PRECISION_HINT")
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    asked = {name for name in (input_name, *output_names) if name is not None}
    outputs = [_tensor(each, f"output {number}", asked) for number, each in enumerate(model.outputs)]
    index = {each.name: number for number, each in enumerate(outputs)}

    def run(x: NDArray[Any], _: str, names: tuple[str, ...]) -> list[NDArray[Any]]:
        answered = compiled([x])
        return [np.array(answered[index[name]]) for name in names]

    notes = []
    if by_default != openvino.Type.f32:
        notes.append(
            "computed with INFERENCE_PRECISION_HINT = f32; by default, OpenVINO computes in "
            f"{by_default.get_type_name()} on this processor"
        )
    return Artifact(
        tuple(_tensor(each, f"input {number}", asked) for number, each in enumerate(model.inputs)),
        tuple(outputs),
        run,
        {"openvino": openvino.__version__.partition("-")[0]},
        frozenset(_formats(model)),
        tuple(notes),
    )


def _own_names(model: Any) -> set[str]:
    """The names of the network's own inputs and outputs. One without a name has a number."""
    own: set[str] = set()
    for kind, ports in (("input", model.inputs), ("output", model.outputs)):
        for number, port in enumerate(ports):
            own |= set(port.get_names()) or {f"{kind} {number}"}
    return own


def _part(model: Any, input_name: str | None, output_names: tuple[str, ...]) -> Any:
    """The network between two tensors, as a model with its own input and results."""
    found = {name: output for op in model.get_ops() for output in op.outputs() for name in output.get_names()}
    named = [name for name in (input_name, *output_names) if name is not None]
    if missing := [name for name in named if name not in found]:
        raise ValueError(f"it has no tensor {', '.join(missing)}.")
    ends = [found[name] for name in output_names] or [each.node.input_value(0) for each in model.outputs]
    if input_name is None:
        return openvino.Model(ends, model.get_parameters(), "part")
    start = found[input_name]
    fed = openvino.opset13.parameter(start.get_partial_shape(), start.get_element_type())
    fed.output(0).set_names({input_name})
    for target in list(start.get_target_inputs()):
        target.replace_source_output(fed.output(0))
    try:
        return openvino.Model(ends, [fed], "part")
    except RuntimeError as error:
        raise ValueError(
            f"the part between {input_name} and its outputs needs more, perhaps the sizes of the network's input: export the "
            f"network with fixed sizes, or the layer alone. OpenVINO's error: {error}"
        ) from error


def _formats(model: Any) -> set[str]:
    names = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i8": "int8", "u8": "int8"}
    stored = {
        op.get_output_element_type(0).get_type_name()
        for op in model.get_ops()
        if op.get_type_name() == "Constant" and len(op.get_output_shape(0)) > 1
    }
    return {names[each] for each in stored if each in names}


def _tensor(port: Any, otherwise: str, asked: set[str]) -> Tensor:
    names = sorted(port.get_names() & asked) or sorted(port.get_names())
    sizes = tuple(int(size.get_length()) if size.is_static else None for size in port.get_partial_shape())
    return Tensor(names[0] if names else otherwise, np.dtype(port.get_element_type().to_dtype()).name, sizes)
