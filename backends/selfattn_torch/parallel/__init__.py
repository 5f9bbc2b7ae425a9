"""One feature map on many devices: each process has some rows of the image, and attends from them to all."""

from selfattn_torch.parallel.replicas import check_replicas
from selfattn_torch.parallel.sharded import attend_rows
from selfattn_torch.parallel.style import RowParallel

__all__ = ["RowParallel", "attend_rows", "check_replicas"]
