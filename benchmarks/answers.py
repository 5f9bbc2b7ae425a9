"""The expected answers of a problem, computed in numpy in float64, and the comparison with them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from benchmarks.cells import CEILINGS
from benchmarks.problem import Problem
from benchmarks.products import products
from selfattn_core import spec
from selfattn_core.arrays import Array
from selfattn_core.conformance.cases.inputs import rounded
from selfattn_core.conformance.verdicts.tolerance import (
    ALLOWANCES,
    CAPS,
    EPS,
    FACTORS,
    NARROW_ALLOWANCE,
    Expectation,
    Verdict,
    judge,
    measure,
)

__all__ = ["Answers", "Expected"]

Keep = Callable[[Array], Array]

_FAMILY = {"forward": "forward", "train": "vjp", "r1": "r1"}


@dataclass(frozen=True)
class Expected:
    """The expected answers, and the values from which the limits follow.

    Args:
        wanted: the expected answers, in float64.
        noise: the largest error of the same formula in the dtype of the cell, by quantity.
        logits: the largest absolute score.
        magnitudes: the sizes of the sums that cancel, from `spec.magnitudes`.
    """

    wanted: Mapping[str, Array]
    noise: Mapping[str, float]
    logits: float
    magnitudes: Mapping[str, float]


def _same(array: Array) -> Array:
    return array


@dataclass(frozen=True)
class Answers:
    """The expected answers of one problem, each computed when it is first asked for."""

    problem: Problem

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
        problem, cell = self.problem, self.problem.cell
        expected = self.products if name in CEILINGS else self.attention
        needed = {"rows"} if name == "matmul-blocks" else set(expected.wanted) - set(problem.params)
        if not needed <= set(got):
            raise ValueError(f"{name}: no {', '.join(sorted(needed - set(got)))} in the answer")
        family = _FAMILY[cell.step]
        growth = max(1.0, expected.logits / 8)
        allowance = ALLOWANCES[family]
        if cell.dtype != "float32":
            allowance = min(allowance, NARROW_ALLOWANCE)
        verdicts = []
        for quantity, answer in got.items():
            want = expected.wanted[quantity]
            scale = expected.magnitudes.get(quantity, float(np.abs(want).max(initial=0)))
            ulp = EPS[cell.dtype] * scale * growth
            floor = expected.noise[quantity] + allowance * ulp
            known = answer[:, problem.rows] if self._by_rows(quantity) else answer
            limits = Expectation(want, floor, CAPS[family] * ulp)
            if cell.level == "core":
                verdicts.append(judge(quantity, known, limits, cell.dtype))
            else:  # with mixed precision some answers are float32
                verdicts.append(measure(quantity, known.astype(np.float64), limits, FACTORS[cell.dtype]))
        return verdicts

    def _by_rows(self, quantity: str) -> bool:
        """Whether only the chosen rows of this quantity are known. All rows of dq are known, because the others are 0."""
        return self.problem.cell.level == "core" and quantity in ("y", "rows")

    @cached_property
    def attention(self) -> Expected:
        """The answers of attention or of the layer."""
        return self._core_answers(_core) if self.problem.cell.level == "core" else self._layer_answers()

    @cached_property
    def products(self) -> Expected:
        """The answers of the ceilings."""
        return self._core_answers(_ceiling)

    def _layer_answers(self) -> Expected:
        problem, step = self.problem, self.problem.cell.step
        params, x, weight = self._layer_inputs(np.float64)
        dy = None if step == "forward" else weight
        cotangents = None
        if step == "r1":
            cotangents = {"x": 2 * spec.vjp(problem.config, params, x, weight)["x"]}
        magnitudes = spec.magnitudes(problem.config, params, x, dy, cotangents=cotangents)
        wanted = self._layer(np.float64)
        # As in the kit: numpy has no bfloat16, so that borrows the error of float16.
        narrow = "float32" if problem.cell.dtype == "float32" else "float16"
        ratio = EPS[problem.cell.dtype] / EPS[narrow]
        noise = _errors(self._layer(np.dtype(narrow).type), wanted)
        return Expected(
            wanted,
            {name: ratio * error for name, error in noise.items()},
            magnitudes.pop("logits"),
            magnitudes,
        )

    def _layer(self, dtype: type) -> dict[str, Array]:
        config, (params, x, weight) = self.problem.config, self._layer_inputs(dtype)
        if self.problem.cell.step == "forward":
            return {"y": spec.forward(config, params, x)}
        if self.problem.cell.step == "train":
            return {"y": spec.forward(config, params, x), **spec.vjp(config, params, x, weight)}
        return spec.r1(config, params, x, weight)[1]

    def _layer_inputs(self, dtype: type) -> tuple[dict[str, Array], Array, Array]:
        params = {key: array.astype(dtype) for key, array in self.problem.params.items()}
        return params, self.problem.operands["x"].astype(dtype), self.problem.weight.astype(dtype)

    def _core_answers(self, function: Callable[..., dict[str, Array]]) -> Expected:
        step, dtype = self.problem.cell.step, self.problem.cell.dtype
        query, key, *_ = few = self._few(np.float64)

        def keep(array: Array) -> Array:
            return rounded(array, dtype)

        noisy = {name: keep(values) for name, values in function(step, *self._few(np.float32), keep).items()}
        wanted = function(step, *few)
        noise = _errors(noisy, wanted)
        if "query" in wanted:
            whole = np.zeros(self.problem.operands["query"].shape)
            whole[:, self.problem.rows] = wanted["query"]
            wanted["query"] = whole
        return Expected(wanted, noise, float(np.abs(query @ key.mT).max()), {})

    def _few(self, dtype: type) -> tuple[Array, Array, Array, Array]:
        problem = self.problem
        query, key, value = (problem.operands[name].astype(dtype) for name in ("query", "key", "value"))
        return query[:, problem.rows], key, value, problem.checked_weight[:, problem.rows].astype(dtype)


def _errors(noisy: Mapping[str, Array], wanted: Mapping[str, Array]) -> dict[str, float]:
    errors = {name: float(np.abs(noisy[name] - want).max(initial=0)) for name, want in wanted.items()}
    if unbounded := [name for name, error in errors.items() if not np.isfinite(error)]:
        raise OverflowError(f"the noise of {', '.join(unbounded)} overflows: any answer would pass")
    return errors


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
