"""Which rows and which pooling windows each process holds, as plain numbers."""

from itertools import accumulate, groupby
from typing import NamedTuple

__all__ = ["Rows", "chunked"]


class Rows(NamedTuple):
    """The rows of a map of H rows, divided over processes in rank order.

    Args:
        heights: the number of rows of each process, which can be 0.
        rank: the rank of this process in its group.

    Example:
        >>> rows = Rows((3, 0, 4), rank=2)
        >>> rows.total, rows.start, rows.height
        (7, 3, 4)
    """

    heights: tuple[int, ...]
    rank: int

    @property
    def total(self) -> int:
        """H."""
        return sum(self.heights)

    @property
    def height(self) -> int:
        """The rows of this process."""
        return self.heights[self.rank]

    @property
    def start(self) -> int:
        """The row of the whole map that is this process' first."""
        return sum(self.heights[: self.rank])

    def windows(self, pool: int) -> list[range]:
        """For each process, the rows of windows that it has a part of. A window cut by a border is in several.

        Args:
            pool: the size of a window. Rows that fill no window are left out, as pooling leaves them out.

        Example:
            >>> Rows((3, 0, 4), rank=0).windows(2)
            [range(0, 2), range(0, 0), range(1, 3)]
        """
        usable = self.total // pool * pool
        found = []
        for stop, height in zip(accumulate(self.heights), self.heights, strict=True):
            first, last = min(stop - height, usable), min(stop, usable)
            found.append(range(first // pool, -(-last // pool)) if first < last else range(0))
        return found

    def parts(self, pool: int) -> list[tuple[int, int]]:
        """For each window of this process, its first row here and how many rows of it are here.

        Example:
            >>> Rows((3, 4), rank=1).parts(2)
            [(0, 1), (1, 2)]
        """
        found = []
        for window in self.windows(pool)[self.rank]:
            first = max(window * pool - self.start, 0)
            last = min((window + 1) * pool - self.start, self.height)
            found.append((first, last - first))
        return found

    def pieces(self, pool: int) -> list[tuple[int, int]]:
        """For each window of the map, its first piece and their number, if the windows of all processes are in one list.

        Example:
            >>> Rows((3, 4), rank=0).pieces(2)
            [(0, 1), (1, 2), (3, 1)]
        """
        everywhere = [window for windows in self.windows(pool) for window in windows]
        counts = [len(list(same)) for _, same in groupby(everywhere)]
        return [(last - count, count) for last, count in zip(accumulate(counts), counts, strict=True)]

    def begun_earlier(self, pool: int) -> list[bool]:
        """For each process, whether a process before it has a part of its first window.

        Example:
            >>> Rows((3, 4), rank=0).begun_earlier(2)
            [False, True]
        """
        found, reached = [], 0
        for windows in self.windows(pool):
            found.append(bool(windows) and windows.start < reached)
            reached = max(reached, windows.stop)
        return found


def chunked(total: int, count: int) -> tuple[int, ...]:
    """The heights into which torch divides a DTensor, as `torch.chunk` does.

    Args:
        total: H.
        count: the number of processes.

    Example:
        >>> chunked(9, 4)
        (3, 3, 3, 0)
    """
    size = -(-total // count)
    return tuple(min(size, max(0, total - index * size)) for index in range(count))
