"""The collectives of the layer: one that can be differentiated any number of times, and one for a few numbers."""

import torch
import torch.distributed as dist

# `torch.distributed` itself offers no differentiable collective. DTensor is built on these.
from torch.distributed import _functional_collectives as functional

__all__ = ["all_gather", "all_gather_numbers"]


def all_gather(shard: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The shards of all processes along the first axis, in rank order. The derivative is one reduce-scatter.

    Args:
        shard: (n, …), of the same shape in every process.
        group: the process group.
    """
    # The result of a functional collective is a tensor of another type until it is waited for.
    return functional.wait_tensor(functional.all_gather_single(shard.contiguous(), 0, group))


def all_gather_numbers(numbers: list[int], group: dist.ProcessGroup, device: torch.device) -> list[list[int]]:
    """The numbers of every process, in rank order.

    Args:
        numbers: as many in every process.
        group: the process group.
        device: a device that the group communicates on.
    """
    mine = torch.tensor(numbers, device=device)
    everyone = mine.new_empty(dist.get_world_size(group) * len(numbers))
    dist.all_gather_single(everyone, mine, group=group)
    return everyone.view(-1, len(numbers)).tolist()
