"""What many tests share: layers, inputs on which no term of the function vanishes, and comparisons."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from selfattn_core import SelfAttentionConfig, spec
from selfattn_core.arrays import Array
from selfattn_core.conformance import REGISTRY
from selfattn_core.conformance.cases.case import Case
from selfattn_core.conformance.cases.inputs import inputs
from selfattn_core.conformance.verdicts.tolerance import CAPS, EPS, Expectation, measure
from selfattn_core.params import state_table

Params = dict[str, Array]

FLAT = SelfAttentionConfig(11, 3)
POOLED = SelfAttentionConfig(11, 3, 5, out_projection=True, use_bias=False, kv_pool=2)
NORMALISED = SelfAttentionConfig(11, 3, 5, out_projection=True, kv_pool=2, spectral_norm=True)
"""With spectral norm."""

CONFIGS = {
    "flat": FLAT,
    "flat without biases": dataclasses.replace(FLAT, use_bias=False),
    "out projection": SelfAttentionConfig(11, 3, 5, out_projection=True),
    "pooled": POOLED,
    "pooled with biases": dataclasses.replace(POOLED, use_bias=True),
    "pooled by 3": dataclasses.replace(POOLED, kv_pool=3, use_bias=True),
    "pooled without out projection": SelfAttentionConfig(11, 3, kv_pool=2),
}

BACKENDS = [
    pytest.param(name, marks=pytest.mark.slow) if name in ("keras-jax", "keras-torch") else name
    for name in REGISTRY
]
"""Every backend of the kit, for tests that start a process for each. Keras is one layer, asked first on one framework."""

OUTPUT, GRADIENT = CAPS["forward"], CAPS["vjp"]
"""The ulps that an output and a gradient may be off."""


def designed(
    config: SelfAttentionConfig,
    dtype: str = "float32",
    shape: tuple[int, int, int] = (2, 7, 9),
    *,
    seed: int = 0,
    gamma: float = 0.7,
) -> tuple[Params, Array, Array]:
    """Parameters, x and dy on which no term of the function vanishes, as the conformance kit draws them.

    With `CONFIGS` and the default shape, B, H, W, C, Dk, Dv, N and M all differ. The state of a layer with spectral norm is
    one iteration away from vectors that have nothing to do with the kernels, and far from converged.

    Args:
        config: the layer.
        dtype: of all arrays.
        shape: of the maps: B, H, W.
        seed: other seeds give other draws.
        gamma: its value.
    """
    given = inputs(Case("designed", "r1", "", config, shape, gamma=gamma), dtype, seed)
    unrelated = {name: given.params[name][::-1] for name in state_table(config)}
    params = spec.power_iteration(config, {**given.params, **unrelated})
    params = {name: array.astype(dtype) for name, array in params.items()}
    return params, given.x.astype(dtype), given.dy.astype(dtype)


def wide(values: Any) -> Any:
    """An array, or each array of a mapping, in float64 for the specification."""
    if isinstance(values, Mapping):
        return {name: wide(array) for name, array in values.items()}
    return np.asarray(values).astype(np.float64)


def to_numpy(tensor: Any) -> Array:
    """A tensor or variable of Keras as a numpy array."""
    import keras

    return np.asarray(keras.ops.convert_to_numpy(tensor))


def assert_near(
    got: Any, want: Any, ulps: float, dtype: str = "float32", *, scale: float | None = None
) -> None:
    """Compare by the conformance kit's measure: shapes are equal, all values finite, and errors a few ulps.

    Args:
        got: an array.
        want: an array of finite numbers.
        ulps: that the largest error may reach.
        dtype: whose ulp is meant, whatever `got` is stored in.
        scale: the ulp is that of this number; by default of the largest of `want`.
    """
    want = wide(want)
    assert np.isfinite(want).all(), "a comparison needs finite numbers to compare with"
    ulp = EPS[dtype] * float(np.abs(want).max(initial=0) if scale is None else scale)
    verdict = measure("array", wide(got), Expectation(want, ulp, np.inf), ulps)
    assert verdict.passed, verdict.message


def assert_same(got: Mapping[str, Array], want: Mapping[str, Array]) -> None:
    """Compare names, their order, types, shapes and every bit."""
    assert list(got) == list(want)
    for name, array in want.items():
        assert type(got[name]) is np.ndarray, name
        assert got[name].dtype == array.dtype, name
        assert got[name].shape == array.shape, name
        assert got[name].tobytes() == np.ascontiguousarray(array).tobytes(), name
