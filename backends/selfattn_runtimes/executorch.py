"""Programs of ExecuTorch (`.pte`), run by its Python runtime."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from executorch.runtime import Runtime
from numpy.typing import NDArray

from selfattn_core.verifying.artifact import Artifact, Tensor
from selfattn_runtimes.torch_tensors import from_numpy, to_numpy

__all__ = ["open_artifact"]


def open_artifact(path: str, *, input_name: str | None, output_names: tuple[str, ...]) -> Artifact:
    """Open a program.

    Args:
        path: path of the file.
        input_name: name of the input. The whole program is run.
        output_names: names of outputs. The whole program is run.
    """
    # The method keeps the program alive.
    program = Runtime.get().load_program(Path(path))
    method = program.load_method("forward")
    if method is None:
        raise ValueError(f"it has no method forward; it has {', '.join(sorted(program.method_names))}.")
    said = method.metadata
    inputs = [_tensor(f"input {at}", said.input_tensor_meta(at)) for at in range(said.num_inputs())]
    outputs = [_tensor(f"output {at}", said.output_tensor_meta(at)) for at in range(said.num_outputs())]

    def run(x: NDArray[Any], _: str, names: tuple[str, ...]) -> list[NDArray[Any]]:
        with torch.no_grad():
            answered = method.execute([from_numpy(x)])
        by_name = {each.name: value for each, value in zip(outputs, answered, strict=True)}
        return [to_numpy(by_name[name]) for name in names]

    note = "a program contains only the largest sizes that it plans memory for, not whether its sizes are open; these were used"
    return Artifact(tuple(inputs), tuple(outputs), run, {"executorch": version("executorch")}, notes=(note,))


def _tensor(name: str, said: Any) -> Tensor:
    dtypes = {5: "float16", 6: "float32", 7: "float64", 15: "bfloat16"}
    return Tensor(name, dtypes.get(said.dtype(), f"ScalarType {said.dtype()}"), tuple(said.sizes()))
