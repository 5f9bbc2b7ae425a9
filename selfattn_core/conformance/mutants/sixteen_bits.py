"""Mutants of the derivatives in 16 bits: code that is correct in float32, but loses digits in narrower arithmetic.

numpy has no bfloat16, so the edited spec stores bfloat16 values in float32 arrays. The mutants are sums that stop growing
and logits that are rounded. Roundings of single terms, such as the row sums D, the map or dS, are not included. They are no
larger than those of correct backends, so that no limit can separate them.
"""

from collections.abc import Mapping
from functools import partial

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.conformance.cases.inputs import rounded
from selfattn_core.conformance.mutants.edits import edited_spec
from selfattn_core.conformance.mutants.mutant import Mutant, edited, named
from selfattn_core.conformance.reference import Model, Reference

__all__ = ["MUTANTS", "InBfloat16", "in_bfloat16"]


_STORE = "return values.astype(self.dtype).astype(self.arithmetic)"
_STORED = "from selfattn_core.conformance.cases.inputs import rounded; return rounded(values, 'bfloat16')"
_OUTER = "return left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])"
_TOTAL = "return np.asarray(rows.sum(axis=(0, 1)))"
_DGAMMA = 'gradients["gamma"] = np.sum(self.g * layer.z, keepdims=True).reshape(1)'
_G = "self.g = layer.flatten(layer.check("
_ARGMAX = "first = rows[:, windows].argmax(axis=2)"
_MAP_CONSTANT = ("dot_A = A * centred", "dot_A = 0 * A * centred")
_ADD_UP = (
    "from selfattn_core.conformance.mutants.sixteen_bits import added_up; "
    "return added_up({terms}).astype({like}.dtype)"
)


class InBfloat16(Reference):
    """The spec in bfloat16. It stores bfloat16 where a 16-bit layer stores 16 bits, and computes in float32."""

    def __init__(self, *edits: tuple[str, str]) -> None:
        super().__init__(edited_spec("bfloat16", ((_STORE, _STORED), *edits)))

    def dtypes(self) -> tuple[str, ...]:
        """Only bfloat16."""
        return ("bfloat16",)

    def build(
        self,
        config: SelfAttentionConfig,
        params: Mapping[str, Array],
        dtype: str,  # noqa: ARG002 - there is only one
        layout: str,
    ) -> Model:
        """A layer with the weights, whose values bfloat16 can represent already."""
        return super().build(config, params, "float32", layout)

    def forward(self, model: Model, x: Array) -> Array:
        """The output y."""
        return rounded(super().forward(model, x), "bfloat16")

    def attention_map(self, model: Model, x: Array) -> Array:
        """The map A."""
        return rounded(super().attention_map(model, x), "bfloat16")

    def vjp(self, model: Model, x: Array, dy: Array) -> dict[str, Array]:
        """First derivatives."""
        return _all_rounded(super().vjp(model, x, dy))

    def r1(self, model: Model, x: Array, w: Array) -> tuple[float, dict[str, Array]]:
        """The penalty and its gradient."""
        value, gradients = super().r1(model, x, w)
        return value, _all_rounded(gradients)


def _all_rounded(arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {name: rounded(array, "bfloat16") for name, array in arrays.items()}


def added_up(terms: Array) -> Array:
    """The sum over the first axis in bfloat16, one term after another.

    Args:
        terms: an array of any shape.

    Example:
        >>> added_up(np.ones((1000, 1)))
        array([256.], dtype=float32)
    """
    total = np.zeros(terms.shape[1:], np.float32)
    for term in rounded(terms, "bfloat16"):
        total = rounded(total + term, "bfloat16")
    return total


def in_bfloat16(name: str, *edits: tuple[str, str], seen_in: str = "") -> Mutant:
    """A mutant of the family dtype: the spec in bfloat16 with some text of its source replaced.

    Args:
        name: the name of the bug.
        edits: as for `edited`.
        seen_in: where the bug was published.
    """
    return named(name, "dtype", partial(InBfloat16, *edits), seen_in=seen_in)


MUTANTS: tuple[Mutant, ...] = (
    in_bfloat16(
        "kernel gradients summed in 16 bits",
        (
            _OUTER,
            _ADD_UP.format(
                terms="left.reshape(-1, left.shape[-1], 1) * right.reshape(-1, 1, right.shape[-1])",
                like="left",
            ),
        ),
        seen_in="TensorFlow's products of float16 on a CPU",
    ),
    in_bfloat16(
        "bias gradients summed in 16 bits",
        (_TOTAL, _ADD_UP.format(terms="rows.reshape(-1, rows.shape[-1])", like="rows")),
        seen_in="flax.linen.Conv and keras.layers.Conv2D on JAX",
    ),
    in_bfloat16(
        "gradient of gamma summed in 16 bits",
        (
            _DGAMMA,
            (
                "from selfattn_core.conformance.mutants.sixteen_bits import added_up; "
                'gradients["gamma"] = added_up((self.g * layer.z).reshape(-1, 1))'
            ),
        ),
    ),
    in_bfloat16(
        "logits in 16 bits in the backward pass",
        (_G, f"layer.A = _softmax(layer.store(layer.q @ _transpose(layer.k))); {_G}"),
    ),
    in_bfloat16(
        "logits and softmax in 16 bits in the backward pass",
        (_G, f"layer.A = layer.store(_softmax(layer.store(layer.q @ _transpose(layer.k)))); {_G}"),
    ),
    in_bfloat16(
        "gradient in 16 bits to the last of equal values",
        (_ARGMAX, "last = rows[:, windows[:, ::-1]].argmax(axis=2); first = windows.shape[1] - 1 - last"),
    ),
    in_bfloat16(
        "gradient in 16 bits without the row sum",
        ("self.dS = layer.A * (self.dA - self.D)", "self.dS = layer.A * self.dA"),
    ),
    edited("penalty in float16 with the map held constant", "dtype", _MAP_CONSTANT),
    in_bfloat16("penalty in bfloat16 with the map held constant", _MAP_CONSTANT),
    in_bfloat16(
        "penalty in bfloat16 without the factor 2 of its gradient",
        ('{"x": layer.unflatten(2 * dx)}', '{"x": layer.unflatten(dx)}'),
    ),
    in_bfloat16(
        "penalty in bfloat16: no gradient of gamma",
        (
            'gradients["gamma"] = np.sum(g * self.dot_z, keepdims=True)',
            'gradients["gamma"] = np.zeros(1, g.dtype)',
        ),
    ),
)
