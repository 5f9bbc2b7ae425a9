"""Processes of one process group, which do what the process that started them asks."""

import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection, parent_process
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

__all__ = ["Ranks"]

_SECONDS = 60
"""How long a process waits for the others in a collective."""


class Ranks:
    """Processes that form a gloo group.

    Each makes an object, and calls its methods on request, all processes the same. Nothing is shared but the arguments and
    the results.

    Args:
        count: the number of processes.
        make: makes the object in each process. It has to be importable by name.
    """

    def __init__(self, count: int, make: Callable[[], Any]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="selfattn-ranks-")
        context = multiprocessing.get_context("spawn")
        store = os.path.join(self._folder.name, "store")  # noqa: PTH118 - torch expects a string
        self._pipes, self._processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, count, store, theirs, make), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """What each process answers, in rank order.

        Raises:
            RuntimeError: if a process raises or ends. All are ended then, because the others wait for it.
        """
        for pipe in self._pipes:
            pipe.send((method, arguments))
        answers: dict[int, Any] = {}
        while len(answers) < len(self._pipes):
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            for pipe in connection.wait(waiting):
                rank = self._pipes.index(pipe)
                try:
                    error, answers[rank] = self._pipes[rank].recv()
                except EOFError:
                    error = "the process ended"
                if error:
                    self.close()
                    raise RuntimeError(f"rank {rank} of {len(self._pipes)}: {error}")
        return [answers[rank] for rank in sorted(answers)]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()


def _serve(rank: int, count: int, store: str, pipe: Any, make: Callable[[], Any]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    if sys.platform == "linux":
        # All processes are on this machine, whose name may lead to no address.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=_SECONDS),
    )
    served = make()
    while True:
        method, arguments = pipe.recv()
        try:
            pipe.send(("", getattr(served, method)(*arguments)))
        except Exception:
            pipe.send((traceback.format_exc(limit=-3).strip(), None))


def _end_with_parent() -> None:
    # A process that waits in a collective would outlive the one that started it.
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
