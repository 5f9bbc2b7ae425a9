"""The limits for the outputs of a file, by the precision that it computes in.

For float64, float32, float16 and bfloat16 the limits are those of the conformance kit: 8 or 4 noise floors, and a cap. The
noise floor is the error of the numpy definition at the same weights, computed in that precision. For a file in 16 bits the
weights have this precision too. int8 has a similar limit: 4 times the error of the definition with kernels and every stored
array (x, q, k, v, the map, o, y) rounded to 256 levels between its own smallest and largest value. Arithmetic in int8 that
keeps its ranges stays within this limit.

Some runtimes add up the keys one after the other, while numpy adds them in pairs. Both are correct. Over M keys the first
may be off by M half ulp of the sum of the terms, mostly if all terms are similar (Higham, "Accuracy and Stability of
Numerical Algorithms", 2002, section 4.2). So a file that exceeds the limits gets wider ones. Their noise floor is the
largest of the errors above and of the error of the definition with sums in that order, and the cap grows by that bound.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.conformance.cases.case import SIXTEEN_BITS, Case
from selfattn_core.conformance.cases.inputs import Inputs, rounded
from selfattn_core.conformance.reference import FusedLayer, LayerReference
from selfattn_core.conformance.verdicts.expected import expectations, quantities
from selfattn_core.conformance.verdicts.tolerance import EPS, FACTORS, Expectation
from selfattn_core.spec import Layer
from selfattn_core.verifying.questions import Question

__all__ = ["INT8_FACTOR", "PRECISIONS", "expected", "factor", "found_precision", "held"]


PRECISIONS = ("float64", "float32", "float16", "bfloat16", "int8")
"""The precisions from the finest to the coarsest."""

INT8_FACTOR = 4.0
"""The number of noise floors that an error may reach in int8, as in 16 bits."""


def found_precision(input_dtype: str, formats: frozenset[str]) -> tuple[str, str]:
    """The default precision for the limits of a file, and the reason.

    Args:
        input_dtype: dtype of x.
        formats: dtypes of stored weights and of products, if the runtime provides them.

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
    """The number of noise floors that an error may reach."""
    return INT8_FACTOR if precision == "int8" else FACTORS[precision]


def held(x: Array, input_dtype: str, precision: str) -> Array:
    """The input in float64, rounded to values that both the file's input and its precision can represent.

    Args:
        x: any values.
        input_dtype: dtype of the file's input.
        precision: precision that sets the limits.
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
    """The expected outputs of a file, with their noise floors and caps.

    Args:
        config: options of the layer.
        params: its weights, float64.
        question: the input.
        precision: precision that sets the limits.
        asked: "y", "map" or both.
        in_turn: whether the file may have summed over keys one by one. This has no effect in 16 bits and int8.
    """
    in_turn = in_turn and precision in ("float64", "float32")
    # The maps of the whole batch may not fit into memory.
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
    """The largest error of the definition in this precision. As in the kit, float64 and bfloat16 use that of another."""
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
    """The definition's layer with sums over keys computed one key after the other."""

    def attend(self, config: SelfAttentionConfig) -> None:
        scores = self.q @ self.k.mT
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        self.A = weights / np.add.accumulate(weights, axis=-1)[..., -1:]
        terms = (self.A[:, :, m : m + 1] * self.v[:, m : m + 1] for m in range(self.v.shape[1]))
        self.o = self.store(sum(terms, np.zeros_like(self.A[:, :, :1] * self.v[:, :1])))
        self.z = self.project("out", self.o) if config.out_projection else self.o


class _EightBits(Layer):
    """The definition's layer with kernels and all stored arrays rounded to 256 levels."""

    def flatten(self, maps: Array) -> Array:
        return self.store(super().flatten(maps))

    def kernel(self, name: str) -> Array:
        kernel = super().kernel(name)
        # The file stores a kernel divided by its norm.
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
