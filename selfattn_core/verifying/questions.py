"""The inputs for an artifact: designed to reveal a wrong layer, in the sizes that the file accepts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from selfattn_core import spec
from selfattn_core.arrays import Array
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.verifying.errors import VerifyError

__all__ = ["LARGEST_MAP", "Question", "own_question", "questions"]

Sizes = tuple[int | None, int | None, int | None]
Kind = Literal["ordinary", "peaked", "huge", "flat", "shifted", "alike"]

LARGEST_MAP = 2**26
"""The most weights of a map for which the definition is computed: 8192 positions without pooling.

In float64 they take half a gigabyte for each sample.
"""

# A block of a memory-linear layer in float32, 8 MiB, holds less than half of these weights.
_MANY_WEIGHTS = 9 * 2**19

# The largest logit for an input of each kind, about three standard deviations, and a description of the kind.
_LOGITS: Mapping[Kind, float] = {
    "ordinary": 9.0,
    "peaked": 90.0,
    "huge": 3000.0,
    "shifted": 9.0,
    "alike": 9.0,
}
_WORDS: Mapping[Kind, str] = {
    "ordinary": "logits up to 9",
    "peaked": "logits up to 90, a peaked map",
    "huge": "logits up to 3000",
    "flat": "an input near 0",
    "shifted": "an input far from 0",
    "alike": "every position equal",
}

_OVERFLOWING: Mapping[str, tuple[Kind, ...]] = {
    "float16": ("huge",),
    "bfloat16": ("huge",),
    # An int8 file may cut these inputs off, because its ranges were measured on other inputs.
    "int8": ("huge", "peaked", "flat", "shifted"),
}
"""Kinds of input that are left out in a precision."""


@dataclass(frozen=True)
class Question:
    """One input.

    Args:
        name: description of the input.
        x: (B, H, W, C), float64 values that the file's input can represent.
    """

    name: str
    x: Array


def questions(
    config: SelfAttentionConfig, params: Mapping[str, Array], sizes: Sizes, precision: str, seed: int = 0
) -> list[Question]:
    """The designed inputs for a file.

    Args:
        config: options of the layer.
        params: its weights, float64.
        sizes: (B, H, W) that the file accepts, with None for an open size.
        precision: precision that sets the limits.
        seed: seed of the random inputs.

    Raises:
        VerifyError: if the map is smaller than a pooling window, or too large.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    left_out = _OVERFLOWING.get(precision, ())
    found = []
    problems = []
    for shape, kinds in _shapes(config, sizes):
        if problem := size_problem(config, shape):
            problems.append(problem)
            continue
        for kind in kinds:
            if kind not in left_out:
                x = _draw(generator, (*shape, config.channels), kind)
                x = _scaled(config, params, x, _LOGITS[kind]) if kind in _LOGITS else x
                found.append(Question(f"{'×'.join(map(str, shape))}, {_WORDS[kind]}", x))
    if not found:
        raise VerifyError(problems[0])
    return found


def own_question(config: SelfAttentionConfig, x: Array, name: str) -> Question:
    """The user's own input.

    Args:
        config: options of the layer.
        x: (B, H, W, C), finite.
        name: description of its origin.

    Raises:
        VerifyError: if its map is too small or too large.
    """
    batch, height, width, _ = x.shape
    if problem := size_problem(config, (batch, height, width)):
        raise VerifyError(f"{name}: {problem}")
    return Question(f"{batch}×{height}×{width}, {name}", x.astype(np.float64))


def size_problem(config: SelfAttentionConfig, shape: tuple[int, int, int]) -> str:
    """Why maps of this size cannot be compared. Empty if they can."""
    _, height, width = shape
    down, across = config.key_grid(height, width)
    if not down * across:
        return (
            f"{height}×{width} positions hold no pooling window of {config.kv_pool}×{config.kv_pool}; "
            "the layer of these weights does not accept a map that is so small."
        )
    if height * width * down * across > LARGEST_MAP:
        return (
            f"{height}×{width} positions have a map of {height * width}×{down * across} weights; the definition computes at "
            f"most {LARGEST_MAP}: export for a smaller map, or with open sizes."
        )
    return ""


def _shapes(
    config: SelfAttentionConfig, sizes: Sizes
) -> Iterator[tuple[tuple[int, int, int], tuple[Kind, ...]]]:
    every: tuple[Kind, ...] = ("ordinary", "peaked", "huge", "flat", "shifted", "alike")
    side = config.kv_pool
    wanted: list[tuple[tuple[int, int, int], tuple[Kind, ...]]] = [
        ((2, 2 * side + 1, 4 * side + 1), every),
        ((1, 8 * side, 8 * side), ("ordinary", "huge")),
        ((3, 2 * side, 5 * side), ("ordinary",)),
        ((1, *_many(config, sizes[1], sizes[2])), ("ordinary", "peaked")),
    ]
    if None in sizes[1:]:
        seen = set()
        for shape, kinds in wanted:
            fitted = _fitted(sizes, shape)
            if fitted not in seen:
                seen.add(fitted)
                yield fitted, kinds
    else:
        yield _fitted(sizes, (2, 1, 1)), every


def _fitted(sizes: Sizes, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    batch, height, width = (own if fixed is None else fixed for fixed, own in zip(sizes, shape, strict=True))
    return batch, height, width


def _many(config: SelfAttentionConfig, height: int | None, width: int | None) -> tuple[int, int]:
    """Sides whose map is larger than several blocks. Open sides are not multiples of the pooling window."""
    side = config.kv_pool
    for windows in range(1, 2**10):
        across = windows * side + (side > 1)
        sides = (height or across, width or across + 5 * side)
        down, along = config.key_grid(*sides)
        if sides[0] * sides[1] * down * along >= _MANY_WEIGHTS:
            break
    return sides


def _draw(generator: np.random.Generator, shape: tuple[int, ...], kind: Kind) -> Array:
    x = generator.standard_normal(shape)
    if kind == "alike":
        return np.broadcast_to(x[:, :1, :1], shape).copy()
    return x + 5 if kind == "shifted" else x / 1000 if kind == "flat" else x


def _scaled(config: SelfAttentionConfig, params: Mapping[str, Array], x: Array, wanted: float) -> Array:
    """The input, scaled so that the largest logit is about this value. The part from biases does not grow with the scale."""
    small = x[:1, : 4 * config.kv_pool, : 4 * config.kv_pool]
    scale = 1.0
    for _ in range(4):
        logits = spec.magnitudes(config, params, small * scale)["logits"]
        scale = float(np.clip(scale * np.sqrt(wanted / max(logits, 1e-6)), 1e-3, 1e4))
    return x * scale
