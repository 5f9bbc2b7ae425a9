"""Programs of `torch.export` (`.pt2`), run by PyTorch."""

from typing import Any

import torch
from numpy.typing import NDArray

from selfattn_core.verifying.artifact import Artifact, Tensor

__all__ = ["open_artifact"]


def open_artifact(path: str, *, input_name: str | None, output_names: tuple[str, ...]) -> Artifact:
    """Open a program.

    Args:
        path: of the file.
        input_name: of the input; the whole program is run.
        output_names: of outputs; the whole program is run.
    """
    program = torch.export.load(path)
    module = program.module()
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    inputs = [_tensor(name, values[name]) for name in program.graph_signature.user_inputs]
    outputs = [_tensor(name, values.get(name)) for name in program.graph_signature.user_outputs]

    def run(x: NDArray[Any], _: str, names: tuple[str, ...]) -> list[NDArray[Any]]:
        given = torch.from_numpy(x) if x.dtype.name != "bfloat16" else _from_bfloat16(x)
        with torch.no_grad():
            answered = module(given)
        flat = answered if isinstance(answered, tuple | list) else (answered,)
        by_name = {each.name: value for each, value in zip(outputs, flat, strict=True)}
        return [_to_numpy(by_name[name]) for name in names]

    stored = {str(tensor.dtype).removeprefix("torch.") for tensor in program.state_dict.values()}
    return Artifact(tuple(inputs), tuple(outputs), run, {"torch": torch.__version__}, frozenset(stored))


def _from_bfloat16(x: NDArray[Any]) -> Any:
    return torch.from_numpy(x.astype("float32")).bfloat16()


def _to_numpy(tensor: Any) -> NDArray[Any]:
    array: NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def _tensor(name: str, value: Any) -> Tensor:
    shape = tuple(size if isinstance(size, int) else None for size in value.shape)
    return Tensor(name, str(value.dtype).removeprefix("torch."), shape)
