"""The cases, as data: what is computed, by which layer, on which input.

Every input can see bugs: seeded and random, all axes of different size, biases and gamma not zero, logits of about 8
so that the map is far from uniform. Cases named for an edge (one position, gamma 0, constant input) are the exceptions.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from selfattn_core.config import SelfAttentionConfig
from selfattn_core.params import parameter_table

__all__ = ["CASES", "DTYPES", "FAMILIES", "Case", "Family", "Inputs", "inputs"]

Array = NDArray[Any]
Family = Literal["forward", "map", "vjp", "r1", "params"]
FAMILIES: tuple[Family, ...] = ("forward", "map", "vjp", "r1", "params")
DTYPES = ("float32", "float64")


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        id: stable for ever; a case that changes gets a new one.
        family: which ability it asks for.
        title: what it is there to see.
        config: the layer.
        shape: (B, H, W) of the input.
        gamma: the residual gain.
        logits: standard deviation of the entries of q kᵀ.
        constant: whether every position of the input is the same.
    """

    id: str
    family: Family
    title: str
    config: SelfAttentionConfig
    shape: tuple[int, int, int] = (2, 5, 7)
    gamma: float = 0.7
    logits: float = 3.0
    constant: bool = False


@dataclass(frozen=True)
class Inputs:
    """What a case is run on; x and dy are (B, H, W, C)."""

    params: Mapping[str, Array]
    x: Array
    dy: Array


_FLAT = SelfAttentionConfig(24)
_POOLED = SelfAttentionConfig.pooled(16)

_LAYERS: tuple[tuple[str, SelfAttentionConfig], ...] = (
    ("flat form", _FLAT),
    ("official pooled form, odd map", _POOLED),
    ("flat without biases", SelfAttentionConfig(10, 3, use_bias=False)),
    ("out projection, narrow value", SelfAttentionConfig(11, 3, 6, out_projection=True)),
    ("out projection, wide value", SelfAttentionConfig(6, 4, 9, out_projection=True)),
    ("pooled with biases", SelfAttentionConfig(12, 3, 5, out_projection=True, kv_pool=2)),
    ("pooled by 3, no out projection", SelfAttentionConfig(9, 2, kv_pool=3)),
    ("one-channel query", SelfAttentionConfig(13, 1)),
)
_SHAPES: tuple[tuple[str, SelfAttentionConfig, tuple[int, int, int]], ...] = (
    ("one position", _FLAT, (2, 1, 1)),
    ("one row", _FLAT, (2, 1, 9)),
    ("one column", _FLAT, (3, 8, 1)),
    ("batch of one", _FLAT, (1, 6, 4)),
    ("empty batch", _FLAT, (0, 5, 7)),
    ("one pooled key", _POOLED, (2, 2, 3)),
    ("even map, pooled", _POOLED, (3, 4, 6)),
    ("empty batch, pooled", _POOLED, (0, 4, 6)),
)


def _rows() -> Iterator[Case]:
    def number(prefix: str) -> Iterator[str]:
        return (f"SA-{prefix}-{index:03d}" for index in range(1, 1000))

    def everywhere(family: Family, ids: Iterator[str]) -> Iterator[Case]:
        for title, config in _LAYERS:
            yield Case(next(ids), family, title, config)
        for title, config, shape in _SHAPES:
            yield Case(next(ids), family, title, config, shape)

    ids = number("FWD")
    yield from everywhere("forward", ids)
    yield Case(next(ids), "forward", "gamma 0: the identity", _FLAT, gamma=0.0)
    yield Case(next(ids), "forward", "negative gamma", _POOLED, gamma=-0.7)
    yield Case(next(ids), "forward", "large logits", _FLAT, logits=120.0)
    yield Case(next(ids), "forward", "constant input", _FLAT, constant=True)
    ids = number("MAP")
    yield from everywhere("map", ids)
    yield Case(next(ids), "map", "large logits", _FLAT, logits=120.0)
    yield Case(next(ids), "map", "constant input: a uniform map", _FLAT, constant=True)
    ids = number("VJP")
    yield from everywhere("vjp", ids)
    yield Case(next(ids), "vjp", "gamma 0: only gamma has a gradient", _FLAT, gamma=0.0)
    yield Case(next(ids), "vjp", "negative gamma", _POOLED, gamma=-0.7)
    ids = number("GAN")
    yield from everywhere("r1", ids)
    yield Case(next(ids), "r1", "gamma 0", _FLAT, gamma=0.0)
    yield Case(next(ids), "r1", "negative gamma", _POOLED, gamma=-0.7)
    ids = number("PAR")
    for title, config in _LAYERS:
        yield Case(next(ids), "params", title, config)


CASES: tuple[Case, ...] = tuple(_rows())


def inputs(case: Case, dtype: str, seed: int = 0) -> Inputs:
    """The input of a case: equal arguments give equal bits.

    Args:
        case: the case.
        dtype: of all arrays.
        seed: other seeds give other draws of the same design.

    Returns:
        Arrays in which no max-pooling window is decided by rounding: two implementations that differ in the last bit
        would send its gradient to different positions, and both would be right.
    """
    for attempt in range(100):
        drawn = _draw(case, np.dtype(dtype), [seed, attempt, *case.id.encode()])
        if case.config.kv_pool == 1 or _decided(case, drawn):
            return drawn
    raise AssertionError(f"{case.id}: no draw in 100 had clear winners in all its pooling windows.")


def _draw(case: Case, dtype: np.dtype[Any], entropy: list[int]) -> Inputs:
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
    config = case.config
    # With x of variance 1, q and k of variance v give logits of variance Dk v².
    spread = {"query": (case.logits / np.sqrt(config.qk_channels)) ** 0.5}
    spread["key"] = spread["query"]
    params = {}
    for name, row in parameter_table(config).items():
        role = name.partition(".")[0]
        scale = spread.get(role, 1.0)
        if name == "gamma":
            params[name] = np.array([case.gamma])
        elif name.endswith("kernel"):
            params[name] = generator.normal(0, scale / np.sqrt(row.shape[0]), row.shape)
        else:
            params[name] = generator.normal(0, 0.4 * scale, row.shape)
    shape = (*case.shape, config.channels)
    x = generator.standard_normal(shape)
    if case.constant:
        x = np.broadcast_to(x[:, :1, :1], shape)
    dy = generator.standard_normal(shape)
    rounded = {name: value.astype(dtype) for name, value in params.items()}
    return Inputs(rounded, np.array(x, dtype), dy.astype(dtype))


def _decided(case: Case, drawn: Inputs) -> bool:
    """Whether in every window the largest value leads by far more than float32 rounding."""
    side = case.config.kv_pool
    _, height, width = case.shape
    down, across = height // side, width // side
    for role in ("key", "value"):
        values = drawn.x.astype(np.float64) @ drawn.params[f"{role}.kernel"].astype(np.float64)
        whole = values[:, : down * side, : across * side]
        windows = whole.reshape(-1, down, side, across, side, values.shape[-1]).swapaxes(2, 3)
        ordered = np.sort(windows.reshape(*windows.shape[:3], side * side, values.shape[-1]), axis=3)
        if ordered.size and (ordered[..., -1, :] - ordered[..., -2, :]).min() < 1e-4:
            return False
    return True
