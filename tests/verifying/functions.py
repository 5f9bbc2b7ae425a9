"""Functions that stand in for exported files, right and wrong ones: `verify` imports this module in a process of its own.

The folder and the case of a test come by environment variables, for a process has no other way to be told.
"""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from selfattn_core import load, spec
from selfattn_core.arrays import Array


def _layer() -> Any:
    config, params = load(Path(os.environ["SELFATTN_TEST_WEIGHTS"]))
    return config, {name: array.astype(np.float32) for name, array in params.items()}


def right(x: Array) -> Array:
    return spec.forward(*_layer(), x)


def channels_first(x: Array) -> Array:
    return np.moveaxis(spec.forward(*_layer(), np.ascontiguousarray(np.moveaxis(x, 1, 3))), 3, 1)


def with_map(x: Array) -> tuple[Array, Array]:
    return spec.forward(*_layer(), x), spec.attention_map(*_layer(), x)


def with_transposed_map(x: Array) -> tuple[Array, Array]:
    return spec.forward(*_layer(), x), np.swapaxes(spec.attention_map(*_layer(), x), 1, 2)


def gamma_dropped(x: Array) -> Array:
    config, params = _layer()
    return spec.forward(config, params | {"gamma": np.ones(1, np.float32)}, x)


def slightly_off(x: Array) -> Array:
    return right(x) * np.float32(1 + 3e-6)


def rounded_to_16_bits(x: Array) -> Array:
    return right(x).astype(np.float16).astype(np.float32)


def another_shape(x: Array) -> Array:
    return right(x)[:, :-1]


def not_a_number(x: Array) -> Array:
    y = right(x)
    y[0, 0, 0, 0] = np.nan
    return y


_SEEN = set()


def remembers(x: Array) -> Array:
    """What it was asked before."""
    known = x.tobytes() in _SEEN
    _SEEN.add(x.tobytes())
    return right(x) + np.float32(0.01 * known)


def even_sizes_only(x: Array) -> Array:
    if x.shape[1] % 2 or x.shape[2] % 2:
        raise ValueError(f"even sizes only,\n\ngot {x.shape}")
    return right(x)


def clamped(x: Array) -> Array:
    if np.abs(x).max() > 10:
        raise ValueError("out of range")
    return right(x)


def crashes_once(x: Array) -> Array:
    """On the first input of all; the runtime's own process is not there to tell."""
    marker = Path(os.environ["SELFATTN_TEST_WEIGHTS"]).parent / "crashed"
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return right(x)


def crashes_on_large_maps(x: Array) -> Array:
    if x.shape[1] * x.shape[2] > 100:
        os.kill(os.getpid(), signal.SIGKILL)
    return right(x)


def dies_after_its_answer(x: Array) -> Array:
    """Between two inputs, when nobody waits for it."""
    threading.Timer(0.02, os._exit, (0,)).start()
    return right(x)


def forks(x: Array) -> Array:
    """A child that holds everything open that the process has open, as those of `multiprocessing` do."""
    if not _SEEN:
        _SEEN.add(os.fork() or _sleep_and_exit())
    return right(x)


def _sleep_and_exit() -> None:
    time.sleep(600)
    os._exit(0)


def hangs(x: Array) -> Array:
    time.sleep(600)
    return x


def talks(x: Array) -> Array:
    """Runtimes print."""
    os.write(1, b'{"event": "answered", "dtypes": []}\n')
    return right(x)


not_callable = 3
