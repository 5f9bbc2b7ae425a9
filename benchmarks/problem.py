"""The inputs of a cell and its expected answers, computed in numpy in float64.

A whole map in float64 takes 8·N² bytes, and several maps are needed. So beyond a thousand positions, the answers of the core
are computed only for a few query rows. The weights w are zero in all other rows, and so are the first and second derivatives
from those rows. The answers for the few rows are then exactly those for the whole, while an implementation, which does not
look at its data, does all its work.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from benchmarks.cells import CEILINGS, Cell
from selfattn_core import SelfAttentionConfig, init_params, spec
from selfattn_core.arrays import Array
from selfattn_core.conformance.cases.inputs import rounded
from selfattn_core.conformance.verdicts.tolerance import ALLOWANCES, CAPS, EPS, Expectation, Verdict, judge
from selfattn_ops.blocks import block_rows

__all__ = ["PRODUCTS", "Problem", "products", "row_local"]

Dot = Callable[..., Any]
Keep = Callable[[Array], Array]

_WHOLE = 1024
_ROWS = 48
_FAMILY = {"forward": "forward", "train": "vjp", "r1": "r1"}

PRODUCTS = {"forward": (1, 1), "train": (3, 3), "r1": (9, 5)}
"""The numbers of products in a step of an N×N array with an array of width Dk, and with one of width Dv."""


@dataclass(frozen=True)
class _Answers:
    """The expected answers in float64, and the values from which the limits follow.

    Args:
        wanted: the expected answers.
        noisy: the same in float32.
        logits: the largest absolute logit.
        magnitudes: the sizes of the sums that cancel, from `spec.magnitudes`.
    """

    wanted: Mapping[str, Array]
    noisy: Mapping[str, Array]
    logits: float
    magnitudes: Mapping[str, float]


@dataclass(frozen=True)
class Problem:
    """A cell with its inputs in float32.

    Args:
        cell: the cell.
        config: config of the layer. For the core, a config with its widths.
        operands: q, k, v (1, N, ·) of the core, or x (1, H, W, C) of a layer, in this order.
        params: canonical parameters of a layer. Empty for the core.
        weight: w, in the shape of the output.
        checked_weight: the weights for the expected answers.
        rows: the query rows from which these answers are computed.
        dtype: "float32", or "bfloat16" for the core alone. The arrays are float32, with values that bfloat16 can represent.
    """

    cell: Cell
    config: SelfAttentionConfig
    operands: Mapping[str, Array]
    params: Mapping[str, Array]
    weight: Array
    checked_weight: Array
    rows: Array
    dtype: str = "float32"

    @classmethod
    def of(cls, cell: Cell, seed: int = 0, dtype: str = "float32") -> "Problem":
        """The problem of a cell."""
        draw = np.random.default_rng([seed, cell.channels, cell.side])
        config = (
            SelfAttentionConfig.pooled(cell.channels)
            if cell.level == "pooled"
            else SelfAttentionConfig(cell.channels)
        )
        positions = cell.positions
        if cell.level != "core":
            x = draw.standard_normal((1, cell.side, cell.side, cell.channels), np.float32)
            params = init_params(config, seed)
            for name in [name for name in params if name.endswith("bias")]:
                params[name] += draw.normal(scale=0.1, size=params[name].shape).astype(np.float32)
            params["gamma"][:] = (
                0.7  # at its initial 0 the layer is the identity, and any attention would pass
            )
            weight = draw.standard_normal(x.shape, np.float32)
            return cls(cell, config, {"x": x}, params, weight, weight, np.arange(positions))
        # Scaled so that logits have a standard deviation of 2 for every Dk, and rows attend to several positions.
        spread = np.float32(np.sqrt(2) / config.qk_channels**0.25)
        operands = {
            "query": spread * draw.standard_normal((1, positions, config.qk_channels), np.float32),
            "key": spread * draw.standard_normal((1, positions, config.qk_channels), np.float32),
            "value": draw.standard_normal((1, positions, config.value_channels), np.float32),
        }
        operands = {name: rounded(operand, dtype) for name, operand in operands.items()}
        weight = rounded(draw.standard_normal(operands["value"].shape, np.float32), dtype)
        rows = np.arange(positions)
        checked = weight
        if positions > _WHOLE:
            rows = np.sort(draw.choice(positions, _ROWS, replace=False))
            checked = np.zeros_like(weight)
            checked[:, rows] = weight[:, rows]
        return cls(cell, config, operands, {}, weight, checked, rows, dtype)

    def check(self, name: str, got: Mapping[str, Array]) -> list[Verdict]:
        """Compare the answers of an implementation for `checked_weight` with the expected ones.

        Args:
            name: name of the implementation.
            got: "y" of a forward step. For training, "y" and the gradients of operands and of any parameters by name. For
                an R1 step, only the gradients. For the ceilings, their products.

        Returns:
            A verdict for each quantity of `got`, by the tolerance of the conformance kit.

        Raises:
            ValueError: if `got` lacks the output or the gradient of an operand.
        """
        answers = self._products if name in CEILINGS else self._attention
        needed = {"rows"} if name == "matmul-blocks" else set(answers.wanted) - set(self.params)
        if not needed <= set(got):
            raise ValueError(f"{name}: no {', '.join(sorted(needed - set(got)))} in the answer")
        family = _FAMILY[self.cell.step]
        growth = max(1.0, answers.logits / 8)
        verdicts = []
        for quantity, answer in got.items():
            want = answers.wanted[quantity]
            scale = answers.magnitudes.get(quantity, float(np.abs(want).max(initial=0)))
            ulp = EPS[self.dtype] * scale * growth
            floor = float(np.abs(answers.noisy[quantity] - want).max(initial=0)) + ALLOWANCES[family] * ulp
            known = answer[:, self.rows] if self._by_rows(quantity) else answer
            expected = Expectation(want, floor, CAPS[family] * ulp)
            verdicts.append(judge(quantity, known, expected, self.dtype))
        return verdicts

    def _by_rows(self, quantity: str) -> bool:
        """Whether only the chosen rows of this quantity are known. All rows of dq are known, because the others are 0."""
        return self.cell.level == "core" and quantity in ("y", "rows")

    @property
    def blocks(self) -> list[slice]:
        """The query rows of the blocks that the operators would choose."""
        positions = self.cell.positions
        rows = block_rows(None, 1, positions, positions)
        return [slice(start, min(start + rows, positions)) for start in range(0, positions, rows)]

    @cached_property
    def _attention(self) -> "_Answers":
        return self._layer_answers() if self.cell.level != "core" else self._core_answers(_core)

    @cached_property
    def _products(self) -> "_Answers":
        return self._core_answers(_ceiling)

    def _layer_answers(self) -> "_Answers":
        params = {key: array.astype(np.float64) for key, array in self.params.items()}
        x, weight = self.operands["x"].astype(np.float64), self.weight.astype(np.float64)
        dy = None if self.cell.step == "forward" else weight
        cotangents = None
        if self.cell.step == "r1":
            cotangents = {"x": 2 * spec.vjp(self.config, params, x, weight)["x"]}
        magnitudes = spec.magnitudes(self.config, params, x, dy, cotangents=cotangents)
        return _Answers(
            self._layer(params, x, weight),
            self._layer(self.params, self.operands["x"], self.weight),
            magnitudes.pop("logits"),
            magnitudes,
        )

    def _core_answers(self, function: Callable[..., dict[str, Array]]) -> "_Answers":
        query, key, *_ = few = self._few(np.float64)

        def keep(array: Array) -> Array:
            return rounded(array, self.dtype)

        noisy = function(self.cell.step, *self._few(np.float32), keep)
        answers = [function(self.cell.step, *few), {name: keep(value) for name, value in noisy.items()}]
        for each in answers:
            if "query" in each:
                whole = np.zeros(self.operands["query"].shape, each["query"].dtype)
                whole[:, self.rows] = each["query"]
                each["query"] = whole
        return _Answers(*answers, float(np.abs(query @ key.mT).max()), {})

    def _few(self, dtype: type) -> tuple[Array, Array, Array, Array]:
        query, key, value = (self.operands[name].astype(dtype) for name in ("query", "key", "value"))
        return query[:, self.rows], key, value, self.checked_weight[:, self.rows].astype(dtype)

    def _layer(self, params: Mapping[str, Array], x: Array, weight: Array) -> dict[str, Array]:
        if self.cell.step == "forward":
            return {"y": spec.forward(self.config, params, x)}
        if self.cell.step == "train":
            return {"y": spec.forward(self.config, params, x), **spec.vjp(self.config, params, x, weight)}
        return spec.r1(self.config, params, x, weight)[1]


def products(step: str, dot: Dot, query: Any, key: Any, value: Any, weight: Any) -> dict[str, Any]:
    """The matrix products of a step in order, each on the results of earlier products, without other operations.

    Args:
        step: "forward", "train" or "r1".
        dot: `dot(a, b)`, `dot(a, b, "ta")` for aᵀ b and `dot(a, b, "tb")` for a bᵀ.
        query: (1, N, Dk).
        key: (1, N, Dk).
        value: (1, N, Dv).
        weight: (1, N, Dv).

    Returns:
        Arrays that together need every product. "rows" and "query" belong to query rows.
    """
    scores = dot(query, key, "tb")
    rows = dot(scores, value)
    if step == "forward":
        return {"rows": rows}
    d_scores = dot(weight, value, "tb")
    d_query, d_key, d_value = dot(d_scores, key), dot(d_scores, query, "ta"), dot(scores, weight, "ta")
    if step == "train":
        return {"rows": rows, "query": d_query, "key": d_key, "value": d_value}
    moved = dot(d_query, key, "tb")  # N×N, like the next two
    moved_key = dot(d_query, d_key, "tb")
    moved_value = dot(weight, d_value, "tb")
    return {
        "rows": rows,
        "query": dot(moved, key) + dot(moved_value, d_key),
        "key": dot(moved_key, query, "ta") + dot(d_scores, d_query, "ta"),
        "value": dot(moved, weight, "ta"),
    }


def row_local(step: str, blocks: list[dict[str, Any]], join: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """Join the products of blocks of query rows that need no other rows.

    Args:
        step: see `products`.
        blocks: the results of `products` for each block.
        join: concatenates arrays along the rows.
    """
    # In an R1 step the rest of "query" also needs the sums over blocks, which no product computes.
    names = [name for name in ("rows", "query") if name in blocks[0] and (name == "rows" or step == "train")]
    return {name: join([block[name] for block in blocks]) for name in names}


def _same(array: Array) -> Array:
    return array


def _ceiling(
    step: str, query: Array, key: Array, value: Array, weight: Array, keep: Keep = _same
) -> dict[str, Array]:
    def dot(a: Array, b: Array, transposed: str = "") -> Array:
        return keep((a.mT if transposed == "ta" else a) @ (b.mT if transposed == "tb" else b))

    return products(step, dot, query, key, value, weight)


def _core(
    step: str, query: Array, key: Array, value: Array, weight: Array, keep: Keep = _same
) -> dict[str, Array]:
    """The formulas of `spec` for the given query rows. The derivatives are computed as if there were no other rows.

    In 16 bits, `keep` rounds the map and dS before products, and every answer.
    """
    scores = query @ key.mT
    A = np.exp(scores - scores.max(-1, keepdims=True))
    A /= A.sum(-1, keepdims=True)
    if step == "forward":
        return {"y": keep(keep(A) @ value)}
    dA = weight @ value.mT
    D = (A * dA).sum(-1, keepdims=True)
    dS = A * (dA - D)
    dq, dk, dv = keep(keep(dS) @ key), keep(keep(dS).mT @ query), keep(keep(A).mT @ weight)
    if step == "train":
        return {"y": keep(keep(A) @ value), "query": dq, "key": dk, "value": dv}
    moved_q, moved_k, moved_v = 2 * dq, 2 * dk, 2 * dv  # gradients of the squared norm
    U = moved_q @ key.mT + query @ moved_k.mT
    centred = U - (A * U).sum(-1, keepdims=True)
    X = centred * (dA - D) + weight @ moved_v.mT
    moved_dS = A * (X - (A * X).sum(-1, keepdims=True))
    return {
        "query": keep(keep(moved_dS) @ key + keep(dS) @ moved_k),
        "key": keep(keep(moved_dS).mT @ query + keep(dS).mT @ moved_q),
        "value": keep(keep(A * centred).mT @ weight),
    }
