"""Programs of `torch.export` (`.pt2`), run by PyTorch."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch.utils import _pytree as pytree

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
    program = torch.export.load(path)
    module = program.module()
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    # Arguments that are not tensors became constants, and are passed on as constants.
    given = program.graph_signature.user_inputs
    inputs = [_tensor(name, values[name]) for name in given if isinstance(name, str) and name in values]
    names_out = [name for name in program.graph_signature.user_outputs if isinstance(name, str)]
    outputs = [_tensor(name, values[name]) for name in names_out]

    def run(x: NDArray[Any], _: str, names: tuple[str, ...]) -> list[NDArray[Any]]:
        flat_in = [from_numpy(x) if inputs and each == inputs[0].name else each for each in given]
        args, kwargs = pytree.tree_unflatten(flat_in, program.call_spec.in_spec)
        with torch.no_grad():
            answered = module(*args, **kwargs)
        flat = [each for each in pytree.tree_leaves(answered) if isinstance(each, torch.Tensor)]
        by_name = {each.name: value for each, value in zip(outputs, flat, strict=True)}
        return [to_numpy(by_name[name]) for name in names]

    stored = {str(tensor.dtype).removeprefix("torch.") for tensor in program.state_dict.values()}
    return Artifact(tuple(inputs), tuple(outputs), run, {"torch": torch.__version__}, frozenset(stored))


def _tensor(name: str, value: Any) -> Tensor:
    shape = tuple(size if isinstance(size, int) else None for size in value.shape)
    return Tensor(name, str(value.dtype).removeprefix("torch."), shape)
