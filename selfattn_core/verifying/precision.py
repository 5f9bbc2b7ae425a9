"""How far from the definition the output of a file may be, by the format that it computes in.

float64, float32, float16 and bfloat16 are held to the policy of the conformance kit: 8 or 4 noise floors and a hard cap. The floor is
the error of the numpy definition at the same weights, computed in that format; for a file in 16 bits, so are the
weights. int8 has a floor by the same idea: the error of the definition with kernels and every stored array (x, q, k, v, the
map, o, y) rounded to 256 levels between its own smallest and largest value, times 4. Arithmetic in int8 that keeps
its ranges is within it.

Some runtimes add up the keys one after the other, where numpy adds them in pairs. Over M keys that is as right, and may be
off by M half ulp of what is added up, mostly where all terms are alike (Higham, "Accuracy and Stability of Numerical
Algorithms", 2002, section 4.2). So a file that is beyond the limits is held to wider ones: the floor is the largest of
the errors above and of that of the definition with sums in that order, and the cap grows by that bound.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfattn_core.config import SelfAttentionConfig
from selfattn_core.conformance.cases.case import SIXTEEN_BITS, Case
from selfattn_core.conformance.cases.inputs import Inputs, rounded
from selfattn_core.conformance.reference import FusedLayer, LayerReference
from selfattn_core.conformance.verdicts.expected import expectations, quantities
from selfattn_core.conformance.verdicts.tolerance import EPS, FACTORS, Expectation
from selfattn_core.spec import Layer
from selfattn_core.verifying.questions import Question

__all__ = ["INT8_FACTOR", "PRECISIONS", "expected", "factor", "found_precision", "held"]

Array = NDArray[Any]

PRECISIONS = ("float64", "float32", "float16", "bfloat16", "int8")
"""From the finest to the coarsest."""

INT8_FACTOR = 4.0
"""Noise floors that an error may reach in int8, as in 16 bits."""


def found_precision(input_dtype: str, formats: frozenset[str]) -> tuple[str, str]:
    """The format that a file is held to if nobody says which, and why.

    Args:
        input_dtype: of x.
        formats: of stored weights and of products, as far as the runtime tells.

    Example:
        >>> found_precision("float32", frozenset({"float32", "int8"}))
        ('int8', 'the file stores int8')
        >>> found_precision("float32", frozenset())
        ('float32', '')
    """
    if "int8" in formats:
        return "int8", "the file stores int8"
    for narrow in ("bfloat16", "float16"):
        if narrow == input_dtype:
            return narrow, f"the file takes {narrow}"
        if narrow in formats:
            return narrow, f"the file stores {narrow}"
    return ("float64", "the file takes float64") if input_dtype == "float64" else ("float32", "")


def factor(precision: str) -> float:
    """How many noise floors an error may reach."""
    return INT8_FACTOR if precision == "int8" else FACTORS[precision]


def held(x: Array, input_dtype: str, precision: str) -> Array:
    """The input rounded to what the file's input and the format that it computes in both hold, in float64.

    Args:
        x: any values.
        input_dtype: that the file takes.
        precision: that the file is held to.
    """
    for dtype in (input_dtype, precision):
        if dtype in SIXTEEN_BITS or dtype == "float32":
            x = rounded(x, dtype)
    return x.astype(np.float64)


def expected(
    config: SelfAttentionConfig,
    params: Mapping[str, Array],
    question: Question,
    precision: str,
    asked: Sequence[str],
    *,
    in_turn: bool = False,
) -> dict[str, Expectation]:
    """What the outputs of a file should be, with the noise floor and the hard cap around them.

    Args:
        config: the layer.
        params: its weights, float64.
        question: the input.
        precision: that the file is held to.
        asked: "y", "map" or both.
        in_turn: whether sums over keys may have been made one key after the other; in 16 bits and int8 that is nothing.
    """
    in_turn = in_turn and precision in ("float64", "float32")
    # A map of the whole batch may be more than there is memory for.
    samples = [
        _expected(config, params, Question(question.name, question.x[b : b + 1]), precision, asked, in_turn)
        for b in range(question.x.shape[0])
    ]
    return {
        quantity: Expectation(
            np.concatenate([sample[quantity].want for sample in samples]),
            max(sample[quantity].floor for sample in samples),
            max(sample[quantity].cap for sample in samples),
        )
        for quantity in asked
    }


def _expected(
    config: SelfAttentionConfig,
    params: Mapping[str, Array],
    question: Question,
    precision: str,
    asked: Sequence[str],
    in_turn: bool,
) -> dict[str, Expectation]:
    found = {}
    for quantity in asked:
        case = _case(config, params, question, quantity)
        wide = Inputs(params, question.x, np.zeros_like(question.x))
        want = quantities(case, wide, "float64")
        dtype = "float32" if precision == "int8" else precision
        errors = {quantity: _error(case, wide, want[quantity], precision, in_turn=in_turn)}
        expectation = expectations(case, wide, want, errors, dtype)[quantity]
        if in_turn:
            added_up = want[quantity] - question.x if quantity == "y" else want[quantity]
            down, across = config.key_grid(*question.x.shape[1:3])
            bound = down * across * EPS[precision] / 2 * float(np.abs(added_up).max(initial=0))
            expectation = replace(expectation, cap=expectation.cap + bound)
        if precision == "int8":
            expectation = replace(expectation, cap=np.inf)
        found[quantity] = expectation
    return found


def _case(
    config: SelfAttentionConfig, params: Mapping[str, Array], question: Question, quantity: str
) -> Case:
    batch, height, width, _ = question.x.shape
    return Case(
        question.name,
        "map" if quantity == "map" else "forward",
        question.name,
        config,
        (batch, height, width),
        gamma=float(params["gamma"].item()),
    )


def _error(case: Case, wide: Inputs, want: Array, precision: str, *, in_turn: bool) -> float:
    """The largest error that the definition makes in this format; float64 and bfloat16 borrow that of another, as in the kit."""
    if precision == "int8":
        noises = [quantities(case, _in(wide, "float32"), "float32", LayerReference(_EightBits))]
        ratio = 1.0
    elif precision in ("float64", "float32"):
        narrow = _in(wide, "float32")
        noises = [
            quantities(case, narrow, "float32"),
            quantities(case, narrow, "float32", LayerReference(FusedLayer)),
        ]
        noises += [quantities(case, narrow, "float32", LayerReference(_InTurn))] if in_turn else []
        ratio = EPS[precision] / EPS["float32"]
    else:
        noises = [quantities(case, _in(wide, "float16"), "float16")]
        ratio = EPS[precision] / EPS["float16"]
    with np.errstate(invalid="ignore"):
        differences = [
            np.abs(array.astype(np.float64) - want) for noise in noises for array in noise.values()
        ]
    return max(float(each[np.isfinite(each)].max(initial=0)) for each in differences) * ratio


def _in(wide: Inputs, dtype: str) -> Inputs:
    def cast(array: Array) -> Array:
        return array.astype(dtype)

    return Inputs({name: cast(value) for name, value in wide.params.items()}, cast(wide.x), cast(wide.dy))


class _InTurn(Layer):
    """The spec's layer with sums over keys made one key after the other."""

    def attend(self, config: SelfAttentionConfig) -> None:
        scores = self.q @ self.k.mT
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        self.A = weights / np.add.accumulate(weights, axis=-1)[..., -1:]
        terms = (self.A[:, :, m : m + 1] * self.v[:, m : m + 1] for m in range(self.v.shape[1]))
        self.o = self.store(sum(terms, np.zeros_like(self.A[:, :, :1] * self.v[:, :1])))
        self.z = self.project("out", self.o) if config.out_projection else self.o


class _EightBits(Layer):
    """The spec's layer with 256 levels wherever something is stored, and in the kernels."""

    def flatten(self, maps: Array) -> Array:
        return self.store(super().flatten(maps))

    def kernel(self, name: str) -> Array:
        kernel = super().kernel(name)
        # A kernel that is divided by its norm is stored.
        return kernel if self.config.spectral_norm else self.store(kernel)

    def attend(self, config: SelfAttentionConfig) -> None:
        super().attend(config)
        self.A = self.store(self.A)
        self.o = self.store(self.A @ self.v)
        self.z = self.project("out", self.o) if config.out_projection else self.o

    def store(self, values: Array) -> Array:
        if not values.size:
            return values
        low = values.min()
        step = max((values.max() - low) / 255, 1e-30)
        return np.asarray(low + np.rint((values - low) / step) * step)
