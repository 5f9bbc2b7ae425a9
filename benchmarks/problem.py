"""The inputs of a cell and the answers they should get, computed in numpy in float64.

A whole map in float64 takes 8·N² bytes, and several of them are needed, so beyond a thousand positions the answers of
the core are computed for a few query rows only. Its weights w are then zero in all other rows, and so are the first
and second derivatives that those rows contribute: the answers for the few rows are the answers for the whole, exactly,
while an implementation, which does not look at its data, does all of its work.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.cells import CEILINGS, Cell
from selfattn_core import SelfAttentionConfig, init_params, spec
from selfattn_core.conformance.cases.inputs import rounded
from selfattn_core.conformance.verdicts.tolerance import ALLOWANCES, CAPS, EPS, Expectation, Verdict, judge
from selfattn_ops.blocks import block_rows

__all__ = ["PRODUCTS", "Problem", "products", "row_local"]

Array = NDArray[Any]
Dot = Callable[..., Any]
Keep = Callable[[Array], Array]

_WHOLE = 1024
_ROWS = 48
_FAMILY = {"forward": "forward", "train": "vjp", "r1": "r1"}

PRODUCTS = {"forward": (1, 1), "train": (3, 3), "r1": (9, 5)}
"""Products of an N×N array with something Dk and with something Dv wide that a step consists of."""


@dataclass(frozen=True)
class _Answers:
    """What is wanted, in float64, and what it takes to judge how near an answer should be.

    Args:
        wanted: the answers.
        noisy: the same in float32.
        logits: the largest absolute logit.
        magnitudes: the sizes of the sums that cancel, as `spec.magnitudes` has them.
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
        config: the layer; of the core, the one whose widths it has.
        operands: q, k, v (1, N, ·) of the core, x (1, H, W, C) of a layer, in this order.
        params: of a layer, canonical; empty for the core.
        weight: w, in the shape of the output.
        checked_weight: the weights that the wanted answers are for.
        rows: the query rows that they are computed from.
        dtype: "float32", or "bfloat16" of the core alone: the arrays are float32, and bfloat16 holds their values.
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
            params["gamma"][:] = 0.7  # at its initial 0 the layer is the identity, and any attention would do
            weight = draw.standard_normal(x.shape, np.float32)
            return cls(cell, config, {"x": x}, params, weight, weight, np.arange(positions))
        # Scaled so that logits have a standard deviation of 2, whatever Dk: rows attend to some positions, not to one.
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
        """Compare what an implementation returns for `checked_weight` with the wanted answers.

        Args:
            name: of the implementation.
            got: "y" of a forward step; "y", gradients of operands and of any parameters by name for training; the
                gradients alone of an R1 step; of the ceilings their products.

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
        """Whether only the chosen rows of this quantity are known; those of dq are all known, the others being 0."""
        return self.cell.level == "core" and quantity in ("y", "rows")

    @property
    def blocks(self) -> list[slice]:
        """The query rows of the blocks that the ops would choose."""
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
    """The matrix products of a step in their order, each on the results of earlier ones, and nothing between them.

    Args:
        step: "forward", "train" or "r1".
        dot: `dot(a, b)`, `dot(a, b, "ta")` for aᵀ b and `dot(a, b, "tb")` for a bᵀ.
        query: (1, N, Dk).
        key: (1, N, Dk).
        value: (1, N, Dv).
        weight: (1, N, Dv).

    Returns:
        Arrays that together need every product. "rows" belong to query rows, as does "query".
    """
    scores = dot(query, key, "tb")
    rows = dot(scores, value)
    if step == "forward":
        return {"rows": rows}
    d_scores = dot(weight, value, "tb")
    d_query, d_key, d_value = dot(d_scores, key), dot(d_scores, query, "ta"), dot(scores, weight, "ta")
    if step == "train":
        return {"rows": rows, "query": d_query, "key": d_key, "value": d_value}
    moved = dot(d_query, key, "tb")  # N×N, as are the next two
    moved_key = dot(d_query, d_key, "tb")
    moved_value = dot(weight, d_value, "tb")
    return {
        "rows": rows,
        "query": dot(moved, key) + dot(moved_value, d_key),
        "key": dot(moved_key, query, "ta") + dot(d_scores, d_query, "ta"),
        "value": dot(moved, weight, "ta"),
    }


def row_local(step: str, blocks: list[dict[str, Any]], join: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """Of the products of blocks of query rows those that need no other rows, put together.

    Args:
        step: as for `products`.
        blocks: what `products` returned for each.
        join: concatenates arrays along the rows.
    """
    # In an R1 step also the rest of "query" needs the sums over blocks, which no product computes.
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
    """The formulas of `spec`, for the query rows given; the derivatives as if there were no other rows.

    In 16 bits the map and dS are rounded where a product takes them, and every answer, by `keep`.
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
    moved_q, moved_k, moved_v = 2 * dq, 2 * dk, 2 * dv  # what the squared norm sends back
    U = moved_q @ key.mT + query @ moved_k.mT
    centred = U - (A * U).sum(-1, keepdims=True)
    X = centred * (dA - D) + weight @ moved_v.mT
    moved_dS = A * (X - (A * X).sum(-1, keepdims=True))
    return {
        "query": keep(keep(moved_dS) @ key + keep(dS) @ moved_k),
        "key": keep(keep(moved_dS).mT @ query + keep(dS).mT @ moved_q),
        "value": keep(keep(A * centred).mT @ weight),
    }
