"""Random inputs for a cell."""

import numpy as np

from benchmarks.cells import Cell
from benchmarks.problem import Array, Problem, config_of
from selfattn_core import SelfAttentionConfig, init_params
from selfattn_core.conformance.cases.inputs import rounded

__all__ = ["draw"]

_WHOLE = 1024
_ROWS = 48
_USUAL_LOGITS = 2.0
_SAMPLED = 256
_SMALLER = np.float32(64)


def draw(cell: Cell, seed: int = 0) -> Problem:
    """The problem of a cell.

    The scores of the core have a standard deviation of 2 for every Dk, or what the cell says, so rows attend to several
    positions.

    Beyond a thousand positions, the answers of the core are known only for a few query rows. The weights for checks are
    zero in all other rows, and so are the first and second derivatives from those rows. The answers for the few rows are
    then exactly those for the whole, while an implementation, which does not look at its data, does all its work.
    """
    generator = np.random.default_rng([seed, cell.channels, cell.side])
    config = config_of(cell)

    def normal(*shape: int) -> Array:
        return generator.standard_normal((cell.batch, *shape), np.float32)

    if cell.level != "core":
        x = rounded(normal(cell.side, cell.side, cell.channels), cell.dtype)
        params = _params(cell, config, x, generator, seed)
        weight = rounded(normal(*x.shape[1:]), cell.dtype)
        if cell.dtype != "float32":
            # The noise of 16 bits is measured in float16, where second derivatives would overflow.
            weight /= _SMALLER
        return Problem(cell, {"x": x}, params, weight, weight, np.arange(cell.positions))
    spread = np.float32(np.sqrt(cell.logits or _USUAL_LOGITS) / config.qk_channels**0.25)
    operands = {
        "query": spread * normal(cell.positions, config.qk_channels),
        "key": spread * normal(cell.positions, config.qk_channels),
        "value": normal(cell.positions, config.value_channels),
    }
    operands = {name: rounded(operand, cell.dtype) for name, operand in operands.items()}
    weight = rounded(normal(cell.positions, config.value_channels), cell.dtype)
    rows = np.arange(cell.positions)
    checked = weight
    if cell.positions > _WHOLE:
        rows = np.sort(generator.choice(cell.positions, _ROWS, replace=False))
        checked = np.zeros_like(weight)
        checked[:, rows] = weight[:, rows]
    return Problem(cell, operands, {}, weight, checked, rows)


def _params(
    cell: Cell, config: SelfAttentionConfig, x: Array, generator: np.random.Generator, seed: int
) -> dict[str, Array]:
    params = init_params(config, seed)
    for name in [name for name in params if name.endswith("bias")]:
        params[name] += generator.normal(scale=0.1, size=params[name].shape).astype(np.float32)
    params["gamma"][:] = 0.7  # at its initial 0 the layer is the identity, and any attention would pass
    if cell.logits:
        rows = x[0].reshape(-1, cell.channels)[:_SAMPLED]
        query, key = (rows @ params[f"{name}.kernel"] for name in ("query", "key"))
        factor = np.float32(np.sqrt(cell.logits / (query @ key.T).std()))
        params["query.kernel"] *= factor
        params["key.kernel"] *= factor
    return {name: rounded(array, cell.dtype) for name, array in params.items()}
