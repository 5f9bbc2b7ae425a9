"""The implementations in PyTorch."""

import contextlib
import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.cells import CEILINGS
from benchmarks.problem import Problem
from benchmarks.products import products, row_local
from benchmarks.step import RefusedError, Step
from selfattn_ops.torch import attend

__all__ = ["about", "array", "build", "forget", "on", "peak_memory", "synchronize"]

Tensor = torch.Tensor
Function = Callable[..., Tensor]


def about() -> dict[str, Any]:
    """Versions and numbers of threads."""
    return {
        "versions": {"torch": torch.__version__},
        "threads": {"intra_op": torch.get_num_threads(), "inter_op": torch.get_num_interop_threads()},
    }


def array(values: np.ndarray, dtype: str = "float32") -> Tensor:
    """A tensor of these values."""
    # from_numpy would ignore the device.
    return torch.tensor(np.ascontiguousarray(values)).to(getattr(torch, dtype))


def synchronize() -> None:
    """Wait until all computations are done."""
    device = torch.get_default_device()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def forget() -> None:
    """Forget what was compiled. Torch stops compiling a function that it has compiled for several problems."""
    torch.compiler.reset()


@contextlib.contextmanager
def on(device: str) -> Iterator[Mapping[str, str]]:
    """Make all tensors on this device inside a `with` block, and yield its model and driver."""
    from selfattn_ops.devices import torch as devices

    # On the CPU this is the default, and the mode would slow down every timed call.
    with contextlib.nullcontext() if device.startswith("cpu") else torch.device(device):
        yield devices.about(device)


def peak_memory(call: Callable[[], object], device: str) -> int:
    """The peak memory of a call, by torch's counters of the device."""
    from selfattn_ops.devices import torch as devices

    return devices.peak_memory(call, device)


def build(name: str, problem: Problem) -> Step:
    """One implementation on one problem.

    Raises:
        RefusedError: if the implementation cannot compute the problem.
    """
    dtype = problem.cell.dtype
    if problem.cell.level == "core":
        inputs = [array(problem.operands[operand], dtype) for operand in ("query", "key", "value")]
        if name in CEILINGS:
            ceiling = torch.no_grad()(_ceiling(name, problem, *inputs))
            return Step(ceiling, _to_numpy)
        function, parameters = _core(name), {}
    else:
        inputs = [array(problem.operands["x"], dtype).permute(0, 3, 1, 2).contiguous()]
        function, parameters = _layer(name, problem)
        if dtype != "float32":
            function = _mixed(function, inputs[0].device.type, getattr(torch, dtype))
    names = [*problem.operands, *parameters]
    compute = {"forward": _forward, "train": _train, "r1": _r1}[problem.cell.step]

    def run(weight: Tensor) -> dict[str, Tensor]:
        weight = weight.permute(0, 3, 1, 2) if problem.cell.level != "core" else weight
        return compute(function, names, inputs, list(parameters.values()), weight)

    return Step(run, _to_numpy)


def _mixed(function: Function, device: str, dtype: torch.dtype) -> Function:
    """The function under autocast. Derivatives are outside, as torch says they should be."""

    def autocast(*inputs: Tensor) -> Tensor:
        with torch.autocast(device, dtype=dtype):
            return function(*inputs)

    return autocast


def _dot(a: Tensor, b: Tensor, transposed: str = "") -> Tensor:
    if transposed == "ta":
        # In 16 bits on a CPU, a.mT @ b with an N×N array a takes forty times as long.
        return (b.mT @ a).mT if a.dtype == torch.bfloat16 else a.mT @ b
    return a @ (b.mT if transposed == "tb" else b)


def _ceiling(name: str, problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> Callable[..., Any]:
    step = problem.cell.step
    if name == "matmul":
        return lambda weight: products(step, _dot, query, key, value, weight)

    def run(weight: Tensor) -> dict[str, Tensor]:
        blocks = []
        for rows in problem.blocks:
            found = products(step, _dot, query[:, rows], key, value, weight[:, rows])
            blocks.append({kept: found[kept] for kept in ("rows", "query") if kept in found})
        return row_local(step, blocks, lambda parts: torch.cat(parts, dim=1))

    return run


@torch.no_grad()
def _forward(
    function: Function, _names: list[str], inputs: list[Tensor], _parameters: list[Tensor], _weight: Tensor
) -> dict[str, Tensor]:
    return {"y": function(*inputs)}


def _train(
    function: Function, names: list[str], inputs: list[Tensor], parameters: list[Tensor], weight: Tensor
) -> dict[str, Tensor]:
    # backward() instead of autograd.grad, because training calls it and reentrant checkpoints allow only it.
    leaves = [value.detach().requires_grad_() for value in inputs]
    for parameter in parameters:
        parameter.grad = None
    y = function(*leaves)
    (y * weight).sum().backward()
    gradients = [leaf.grad for leaf in (*leaves, *parameters)]
    return {"y": y.detach(), **dict(zip(names, gradients, strict=True))}


def _r1(
    function: Function, names: list[str], inputs: list[Tensor], parameters: list[Tensor], weight: Tensor
) -> dict[str, Tensor]:
    leaves = [value.detach().requires_grad_() for value in inputs]
    gradients = torch.autograd.grad((function(*leaves) * weight).sum(), leaves, create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in gradients)
    # The value bias has no effect on the penalty, so its gradient is filled with zeros.
    second = torch.autograd.grad(penalty, [*leaves, *parameters], materialize_grads=True)
    return dict(zip(names, second, strict=True))


def _to_numpy(answers: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Turn maps into (B, H, W, C), and 1×1 convolutions into matrices."""
    arrays = {}
    for name, answer in answers.items():
        values = answer.detach()
        if values.dim() == 4:
            values = values[:, :, 0, 0].mT if name.endswith("kernel") else values.permute(0, 2, 3, 1)
        wide = values.float() if values.dtype == torch.bfloat16 else values
        arrays[name] = wide.contiguous().cpu().numpy()
    return arrays


def _dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(query @ key.mT, dim=-1) @ value


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(query, key, value, scale=1.0)


def _core(name: str) -> Function:
    plain = {"ours": attend, "dense": _dense, "sdpa": _sdpa}
    if name in plain:
        return plain[name]
    if name == "dense-compiled":
        return torch.compile(_dense, dynamic=False)
    if name == "sdpa-memory-efficient":
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def fused(*operands: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
                heads = (operand[:, None] for operand in operands)
                return nn.functional.scaled_dot_product_attention(*heads, scale=1.0)[:, 0]

        return fused
    if name == "flex-attention":
        from torch.nn.attention.flex_attention import flex_attention

        flexible = torch.compile(flex_attention, dynamic=False)
        return lambda *operands: flexible(*(operand[:, None] for operand in operands), scale=1.0)[:, 0]
    if name == "memory-efficient-attention":
        efficient = _memory_efficient_attention()

        def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            scaled = query * math.sqrt(query.shape[-1])  # it divides by this
            return efficient(scaled[..., None, :], key[..., None, :], value[..., None, :])[..., 0, :]

        return function
    raise ValueError(name)


def _memory_efficient_attention() -> Function:
    """The function of the PyPI package, without its `__init__`, which would also import JAX, whose memory and threads would count."""
    package = "memory_efficient_attention"
    found = importlib.util.find_spec(package)
    if found is None:
        raise RefusedError("not installed: pip install --group bench")
    if package not in sys.modules:
        hollow = types.ModuleType(package)
        hollow.__path__ = list(found.submodule_search_locations or [])
        sys.modules[package] = hollow
    return importlib.import_module(f"{package}.attention_torch").efficient_dot_product_attention


def _layer(name: str, problem: Problem) -> tuple[Function, dict[str, Tensor]]:
    """The layer as a function of x, and its parameters by canonical name."""
    if name == "ours":
        import selfattn_torch

        layer = selfattn_torch.from_canonical(
            problem.config, problem.params, device=torch.get_default_device()
        )
        parameters = {
            key.replace("weight", "kernel"): parameter for key, parameter in layer.named_parameters()
        }
        return layer, parameters
    if name in ("dense", "dense-compiled"):
        module = _Published(problem)
        parameters = dict(zip(problem.params, module.in_order(problem.params), strict=True))
        return module if name == "dense" else torch.compile(module, dynamic=False), parameters
    raise ValueError(name)


class _Published(nn.Module):
    """The layer of most copies (github.com/heykeetae/Self-Attention-GAN, sagan_models.py). f is the query and g the key.

    The pooled form follows the authors' code (github.com/brain-research/self-attention-gan, non_local.py).
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.pool = problem.config.kv_pool
        for name, values in problem.params.items():
            kernel = array(values.T)[..., None, None] if name.endswith("kernel") else array(values)
            self.register_parameter(name.replace(".", "_"), nn.Parameter(kernel))

    def in_order(self, names: Sequence[str]) -> list[Tensor]:
        return [self.get_parameter(name.replace(".", "_")) for name in names]

    def project(self, name: str, x: Tensor) -> Tensor:
        bias = getattr(self, f"{name}_bias", None)
        return nn.functional.conv2d(x, getattr(self, f"{name}_kernel"), bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        query, key, value = (self.project(name, x) for name in ("query", "key", "value"))
        if self.pool > 1:
            key, value = (nn.functional.max_pool2d(maps, self.pool) for maps in (key, value))
        energy = torch.bmm(query.flatten(2).permute(0, 2, 1), key.flatten(2))  # (B, N, M)
        attention = torch.softmax(energy, dim=-1)
        out = torch.bmm(value.flatten(2), attention.permute(0, 2, 1))  # (B, Dv, N)
        out = out.view(batch, -1, height, width)
        if hasattr(self, "out_kernel"):
            out = self.project("out", out)
        return self.gamma * out + x
