"""Print the peak resident memory of one case above its inputs, in bytes: `torch_memory.py CASE N ORDER`.

CASE is "attend", or "dense" and "checkpoint" for the two ways that cost N×N. ORDER is 1 or 2.
"""

import re
import sys
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from selfattn_ops.torch import attend


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.softmax(query @ key.mT, dim=-1) @ value


def checkpointed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    rows = [checkpoint(dense, part, key, value, use_reentrant=False) for part in query.split(256, dim=-2)]
    return torch.cat(rows, dim=-2)


def step(case: str, positions: int, order: int) -> None:
    function = {"attend": attend, "dense": dense, "checkpoint": checkpointed}[case]
    operands = [torch.randn(1, positions, width).requires_grad_() for width in (8, 8, 16)]
    reset_peak()
    before = resident("VmRSS")
    grads = torch.autograd.grad(function(*operands).square().sum(), operands, create_graph=order == 2)
    if order == 2:
        torch.autograd.grad(sum(grad.square().sum() for grad in grads), operands)
    print(resident("VmHWM") - before)  # noqa: T201


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def resident(name: str) -> int:
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    torch.manual_seed(0)
    # What threads and libraries take once is no part of the case.
    warm = [torch.randn(1, 300, 8).requires_grad_() for _ in range(3)]
    attend(*warm, block_size=100).sum().backward()
    step(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
