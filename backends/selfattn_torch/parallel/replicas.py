"""Whether the processes of a group have the same weights and state."""

import zlib

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from selfattn_torch.parallel.collectives import all_gather_numbers

__all__ = ["check_replicas"]


def check_replicas(module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Compare parameters, buffers and configs between the processes of a group, bit for bit, by their checksums.

    Every process of the group has to call it. Call it at the start, and where u and v of spectral norm may have moved
    differently: one process that calls a layer once more in training mode moves them.

    Args:
        module: a layer or a model. DTensors are left out if they are sharded, because their shards differ.
        group: the process group. By default all processes.

    Raises:
        ValueError: if something differs. Every process raises it, with the names and the ranks.

    Example:
        >>> import tempfile
        >>> from selfattn_torch import SelfAttention2d
        >>> folder = tempfile.mkdtemp()
        >>> dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        >>> check_replicas(SelfAttention2d(16))
        >>> dist.destroy_process_group()
    """
    group = dist.group.WORLD if group is None else group
    sums: dict[str, int] = {}
    device = torch.device("cpu")
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        local = tensor.detach()
        if isinstance(local, DTensor):
            if any(not placement.is_replicate() for placement in local.placements):
                continue
            local = local.to_local()
        device = local.device
        sums[name] = zlib.crc32(f"{local.dtype} {tuple(local.shape)}".encode(), _checksum(local))
    configs = [(name, repr(each.config)) for name, each in module.named_modules() if hasattr(each, "config")]
    # One number over all names first: the processes may have another number of them.
    structure = zlib.crc32(repr([configs, list(sums)]).encode())
    counts = all_gather_numbers([structure, len(sums)], group, device)
    if len({tuple(each) for each in counts}) > 1:
        odd = [rank for rank, each in enumerate(counts) if each != counts[0]]
        raise ValueError(
            f"check_replicas: got modules with other configs or other parameters in ranks {odd} than in rank 0; "
            "expected one module in every process."
        )
    everyone = all_gather_numbers(list(sums.values()), group, device)
    problems = [
        f"{name} in ranks {odd}"
        for name, column in zip(sums, zip(*everyone, strict=True), strict=True)
        if (odd := [rank for rank, each in enumerate(column) if each != column[0]])
    ]
    if problems:
        raise ValueError(
            f"check_replicas: got numbers that are not those of rank 0: {', '.join(problems)}; expected equal ones. "
            "Broadcast the parameters and buffers of one rank, or load the same file in each."
        )


def _checksum(tensor: torch.Tensor) -> int:
    # An array would share the memory of the tensor, which FSDP2 could then not free.
    copy = tensor.clone(memory_format=torch.contiguous_format).flatten()
    return zlib.crc32(copy.view(torch.uint8).cpu().numpy().tobytes())
