"""Timing in turns: several functions of one process, or one process and another."""

import gc
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Partner", "interleaved"]

_SAMPLE_SECONDS = 0.01
_LONG_SECONDS = 5.0
_MOST_SAMPLES = 60
_LEAST_WITH_PARTNER = 9
_REST_SECONDS = 0.01


class Partner:
    """The other of two processes that take turns. A number in a pipe passes the turn on.

    Args:
        reads: descriptor of the pipe on which the other passes its turn.
        writes: descriptor of the pipe on which this process passes its turn.
        leads: whether this process has the first turn, and decides how many there are.
    """

    def __init__(self, reads: int, writes: int, *, leads: bool) -> None:
        self.leads = leads
        self._reads = reads
        self._writes = writes

    def wait(self) -> int:
        """Wait for the turn, and return the number that came with it.

        Raises:
            EOFError: if the other process has ended.
        """
        number = os.read(self._reads, 1)
        if not number:
            raise EOFError("the process of the other build has ended")
        # Threads of the other process spin for a moment after its last product.
        time.sleep(_REST_SECONDS)
        return number[0]

    def go(self, number: int = 0) -> None:
        """Pass the turn on, with a number below 256."""
        os.write(self._writes, bytes([number]))

    def agree(self, ready: bool) -> bool:
        """Whether both processes are ready. Afterwards the leader has the turn."""
        if self.leads:
            both = bool(self.wait()) and ready
            self.go(int(both))
            self.wait()
            return both
        self.go(int(ready))
        both = bool(self.wait())
        self.go()
        return both


def interleaved(
    calls: Mapping[str, Callable[[], Any]], seconds: float, partner: Partner | None = None
) -> dict[str, list[float]]:
    """Time several functions in turns.

    Each has one call before its turn that is not timed. Without it a function would pay for the pages of memory that the one
    before it had given back to the system, which no user's loop does.

    Args:
        calls: functions without arguments by name, each called at least once before.
        seconds: time for all of them together. There are at least five turns, or three if a turn is long.
        partner: another process, which has a turn after each of ours. Then there are at least nine turns.

    Returns:
        Seconds for each call, one number for each turn.

    Example:
        >>> sorted(interleaved({"a": int, "b": float}, 0.0))
        ['a', 'b']
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    if partner and not partner.leads:
        partner.wait()
    repeats, turn = _repeats(calls)

    def once() -> None:
        for name, call in calls.items():
            call()
            samples[name].append(_seconds(call, repeats[name]))

    gc.collect()
    gc.disable()
    try:
        if partner is None:
            for _ in range(_turns(seconds, turn, 3 if turn > _LONG_SECONDS else 5)):
                once()
        elif partner.leads:
            partner.go()
            partner.wait()
            for left in reversed(range(_turns(seconds, 2 * turn, _LEAST_WITH_PARTNER))):
                once()
                partner.go(left)
                partner.wait()
        else:
            partner.go()
            left = 1
            while left:
                left = partner.wait()
                once()
                partner.go()
    finally:
        gc.enable()
    return samples


def _turns(seconds: float, turn: float, least: int) -> int:
    return min(max(least, int(seconds / max(turn, 1e-6))), _MOST_SAMPLES)


def _repeats(calls: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, int], float]:
    """The calls of each function in a turn, and the seconds of a turn."""
    repeats = {}
    turn = 0.0
    for name, call in calls.items():
        once = _seconds(call, 1)
        if once < _SAMPLE_SECONDS:
            once = min(once, _seconds(call, 10))
        repeats[name] = max(1, math.ceil(_SAMPLE_SECONDS / max(once, 1e-6)))
        turn += (1 + repeats[name]) * once
    return repeats, turn


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
