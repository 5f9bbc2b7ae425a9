"""Attend on eight devices and on one; prints errors and collectives as JSON. Run by `test_jax.py`."""

import collections
import json
import re
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from selfattn_ops import blocks
from selfattn_ops import jax as ops
from selfattn_ops.jax import blocks as jax_blocks

COLLECTIVES = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def squared(function):
    return lambda *operands: sum((x**2).sum() for x in jax.tree.leaves(function(*operands)))


def main():
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    operands = [rng.normal(size=(16, *shape)) for shape in ((64, 3), (40, 3), (40, 5))]
    gradient = jax.grad(squared(ops.attend), (0, 1, 2))
    orders = {"forward": ops.attend, "penalty": jax.grad(squared(gradient), (0, 1, 2))}
    want = {order: jax.device_get(function(*operands)) for order, function in orders.items()}
    found = {}
    blocks.MINIMUM_ROWS = 8
    for split in (False, True):
        # In 8 rows: all sixteen elements, or less than the eight devices.
        blocks.SCORE_BUDGET = jax_blocks.SCORE_BUDGET = 4 * 8 * 40 * (4 if split else 16)
        for kind in ("Auto", "Explicit"):
            mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType[kind],))
            for axis, specs in (
                ("batch", [P("devices")] * 3),
                ("rows", [P(None, "devices"), P(), P()]),
            ):
                with jax.set_mesh(mesh):
                    placed = [
                        jax.device_put(x, NamedSharding(mesh, spec))
                        for x, spec in zip(operands, specs, strict=True)
                    ]
                    # A batch in one part is the easier half of the same: its values are enough.
                    for order, function in orders.items() if split else [("forward", ops.attend)]:
                        jax.clear_caches()
                        compiled = jax.jit(function).lower(*placed).compile()
                        got = jax.device_get(compiled(*placed))
                        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want[order]), strict=True)
                        found[f"{kind} {axis} {split} {order}"] = {
                            "error": max(
                                float(abs(one - other).max() / abs(other).max()) for one, other in pairs
                            ),
                            "chunks": jax_blocks.plan(operands[0].shape, 40, None)[0],
                            "collectives": collections.Counter(re.findall(COLLECTIVES, compiled.as_text())),
                        }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
