"""A training run with spectral norm as the specification does it, which every adapter repeats in its own training mode."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest

from selfattn_core import SelfAttentionConfig, spec
from selfattn_core.arrays import Array
from selfattn_core.params import parameter_table, state_table

CONFIG = SelfAttentionConfig(11, 3, 5, out_projection=True, spectral_norm=True)
STEPS, RATE, PENALTY = 20, 0.03, 0.05


@dataclass(frozen=True)
class Run:
    """What is trained, on what, and where the specification arrives.

    Each step descends along the gradient of sum(w∘y) + `penalty`·‖d sum(w∘y)/dx‖², both of one forward pass.

    Args:
        config: the layer.
        start: its parameters and state.
        steps: x and w of each step, (B, H, W, C).
        rate: of plain gradient descent.
        penalty: weight of the gradient penalty.
        end: parameters and state after the last step.
        bounds: how far from `end` each array may be: 32 times as far as it goes when every number of the start is
            moved by up to one eps. (It is moved by one of float32, which is far beyond the rounding of the run itself,
            and goes as far in proportion.)
    """

    config: SelfAttentionConfig
    start: Mapping[str, Array]
    steps: list[tuple[Array, Array]]
    rate: float
    penalty: float
    end: Mapping[str, Array]
    bounds: Mapping[str, float]

    def check(self, got: Mapping[str, Array]) -> None:
        """Compare; the key bias is left out, for its gradient is rounding noise."""
        assert list(got) == list(self.end)
        for name, want in self.end.items():
            error = float(np.abs(got[name].astype(np.float64) - want).max())
            assert name == "key.bias" or error <= self.bounds[name], f"{name}: {error} > {self.bounds[name]}"
            moved = float(np.abs(want - self.start[name]).max())
            assert name == "key.bias" or moved > 1e3 * self.bounds[name], f"{name} should move visibly"


@pytest.fixture(scope="session")
def training_run():
    """The run in a dtype, "float32" or "float64"."""

    def run(dtype: str) -> Run:
        generator = np.random.default_rng(5)
        rows = parameter_table(CONFIG) | state_table(CONFIG)
        start = {name: generator.standard_normal(row.shape) for name, row in rows.items()}
        start = {name: array.astype(dtype) for name, array in spec.power_iteration(CONFIG, start).items()}
        shape = (2, 3, 4, CONFIG.channels)
        steps = [
            tuple(generator.standard_normal(shape).astype(dtype) for _ in range(2)) for _ in range(STEPS)
        ]
        eps = float(np.finfo(np.float32).eps)
        moved = {
            name: array * (1 + eps * generator.uniform(-1, 1, array.shape)) for name, array in start.items()
        }
        end, other = (_descend(params, steps) for params in (start, moved))
        allowed = 32 * float(np.finfo(dtype).eps) / eps
        bounds = {name: allowed * float(np.abs(end[name] - other[name]).max()) for name in end}
        return Run(CONFIG, start, steps, RATE, PENALTY, end, bounds)

    return run


def _descend(params: Mapping[str, Array], steps: list[tuple[Array, Array]]) -> dict[str, Array]:
    params = {name: array.astype(np.float64) for name, array in params.items()}
    for step in steps:
        x, w = (maps.astype(np.float64) for maps in step)
        params = spec.power_iteration(CONFIG, params)
        first = spec.vjp(CONFIG, params, x, w)
        _, second = spec.r1(CONFIG, params, x, w)
        for name in parameter_table(CONFIG):
            params[name] = params[name] - RATE * (first[name] + PENALTY * second[name])
    return params
