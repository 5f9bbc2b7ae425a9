"""One of two processes that train the same critic on half a batch each: `python distributed.py RANK 2 STORE`.

Prints a line of JSON: for each way of distributing it, the largest difference of any gradient from that of one process
on the whole batch, over the largest gradient; or the error that the way gives.
"""

import copy
import json
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from selfattn_torch import SelfAttention2d, to_canonical

WORLD = 2


class Critic(nn.Module):
    """A discriminator with attention in the middle, whose forward can give the R1 penalty too."""

    def __init__(self, block_size: int | None, *, spectral_norm: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.attention = SelfAttention2d(
            16, 3, 5, out_projection=True, kv_pool=2, spectral_norm=spectral_norm, block_size=block_size
        )
        self.last = nn.Conv2d(16, 1, 1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0.1, 0.4)
        for child in self.attention.children():
            if spectral_norm:
                child.reset_state()

    def forward(
        self, x: torch.Tensor, *, penalise: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_() if penalise else x
        maps = self.attention(nn.functional.leaky_relu(self.first(x), 0.2))
        logits = self.last(nn.functional.leaky_relu(maps, 0.2)).mean((1, 2, 3))
        return (logits, penalty(logits, x)) if penalise else logits


def penalty(logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return slope.square().flatten(1).sum(1).mean()


def loss(logits: torch.Tensor, r1: torch.Tensor) -> torch.Tensor:
    return nn.functional.softplus(-logits).mean() + 5 * r1


def inside(critic: nn.Module, x: torch.Tensor) -> None:
    loss(*critic(x, penalise=True)).backward()


def outside(critic: nn.Module, x: torch.Tensor) -> None:
    x = x.detach().requires_grad_()
    logits = critic(x)
    loss(logits, penalty(logits, x)).backward()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    plain = Critic(None, spectral_norm=False).double()
    critics = {
        "": plain,
        ", in blocks": Critic(8, spectral_norm=False).double(),
        ", spectral norm": Critic(8, spectral_norm=True).double(),
    }
    x = torch.randn(2 * WORLD, 3, 5, 7, dtype=torch.float64)
    mine = x[2 * rank : 2 * rank + 2]

    def difference(
        critic: Critic,
        distributed: Callable[[Critic], nn.Module],
        step: Callable[[nn.Module, torch.Tensor], None],
    ) -> float | str:
        alone, model = copy.deepcopy(critic), distributed(copy.deepcopy(critic))
        outside(alone, x)
        wanted = [parameter.grad for parameter in alone.parameters()]
        try:
            step(model, mine)
        except RuntimeError as error:
            return f"RuntimeError: {error}"
        without = sum(parameter.grad is None for parameter in model.parameters())
        if without:
            return f"{without} parameters without a gradient"
        got = [whole(parameter.grad) for parameter in model.parameters()]
        errors = [(one - other).abs().max() for one, other in zip(got, wanted, strict=True)]
        return (torch.stack(errors).max() / max(gradient.abs().max() for gradient in wanted)).item()

    def kept(critic: Critic) -> nn.Module:
        fully_shard(critic.attention, reshard_after_forward=False)
        critic.attention.set_reshard_after_backward(False)
        return fully_shard(critic)

    def freed(critic: Critic) -> nn.Module:
        fully_shard(critic.attention)
        return fully_shard(critic)

    results: dict[str, float | str] = {}
    for kind, critic in critics.items():
        results["DDP" + kind] = difference(critic, DistributedDataParallel, outside)
        results["FSDP2" + kind] = difference(critic, fully_shard, inside)
    results["nested groups"] = difference(plain, freed, inside)
    results["nested groups, kept"] = difference(plain, kept, inside)
    results["penalty outside"] = difference(plain, fully_shard, outside)
    try:
        to_canonical(fully_shard(copy.deepcopy(plain)).attention)
    except ValueError as error:
        results["export of shards"] = str(error)
    print(json.dumps(results))  # noqa: T201 - the answer
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[3])
