"""One of three processes that share the rows of a map, of which the second dies: `python dying.py RANK WORLD STORE`."""

import os
import sys

import torch
import torch.distributed as dist

from selfattn_torch import SelfAttention2d
from selfattn_torch.parallel import attend_rows

if __name__ == "__main__":
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world)
    torch.manual_seed(0)
    layer, x = SelfAttention2d(16), torch.randn(1, 16, 2, 5)
    attend_rows(layer, x)
    if rank == 1:
        os._exit(9)
    attend_rows(layer, x)
