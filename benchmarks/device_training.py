"""A training of the small SAGAN on one device, in bfloat16 with R1, in a separate process.

Started by `device_check.py` as `python -m benchmarks.device_training FRAMEWORK DEVICE STEPS RESULT.json`.
"""

import contextlib
import importlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from examples.digits import data
from examples.gan.batches import draw

__all__ = ["main"]

_WARM_UP = 3


def main(framework: str, device: str, steps: int, result_file: str) -> None:
    """Train, and write the result.

    Args:
        framework: "torch" or "jax".
        device: the framework's name of the device.
        steps: number of steps of each network.
        result_file: file for {"steps", "finite", "seconds_per_step", "first", "last"}.
    """
    digits, _ = data.load()
    with _on(framework, device):
        training = _training(framework, device)
        rows, began = [], 0.0
        for step in range(steps):
            if step == min(_WARM_UP, steps - 1):
                began = time.perf_counter()
            # Losses are returned as numbers, so every step is complete.
            rows.append(training.update(draw(digits, 0, step)))
        seconds = (time.perf_counter() - began) / max(1, steps - _WARM_UP)
    finite = all(math.isfinite(value) for row in rows for value in row.values())
    found = {
        "steps": steps,
        "finite": finite,
        "seconds_per_step": seconds,
        "first": rows[0],
        "last": rows[-1],
    }
    Path(result_file).write_text(json.dumps(found), encoding="utf-8")


def _on(framework: str, device: str) -> contextlib.AbstractContextManager[Any]:
    if framework == "torch":
        return contextlib.nullcontext()
    return importlib.import_module("selfattn_ops.devices.jax").OnDevices().on(device)


def _training(framework: str, device: str) -> Any:
    if framework == "torch":
        import torch

        from examples import sagan_torch

        torch.manual_seed(0)
        networks = sagan_torch.Generator(), sagan_torch.Discriminator()
        return sagan_torch.Training(*networks, precision="bfloat16", compiler="none", device=device)
    import jax.numpy as jnp

    from examples import sagan_flax

    return sagan_flax.Training(*sagan_flax.new(0, dtype=jnp.dtype("bfloat16")))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
