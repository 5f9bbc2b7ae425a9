"""Mutants of sizes: layers that are right at most sizes and wrong at some, as kernels are that change with the size."""

from collections.abc import Mapping
from dataclasses import replace

from selfattn_core.arrays import Array
from selfattn_core.conformance.mutants.mutant import Mutant, edited, named
from selfattn_core.conformance.reference import Model, Reference

__all__ = ["MUTANTS"]

_MAP = "self.A = _softmax(self.q @ _transpose(self.k))"
_O = "self.o = self.store(self.A @ self.v)"
_RETURNED_MAP = "return layer.A.astype(layer.dtype)"
_WINDOWS = ".swapaxes(1, 2).reshape(down * across, p * p)"
_MASKED = (
    "scores = self.q @ _transpose(self.k); m = np.arange(scores.shape[2]); "
    "self.A = _softmax(np.where({}, scores, -np.inf).astype(scores.dtype))"
)


def _turned(maps: Array) -> Array:
    """Square maps with H and W exchanged. All other maps as they are."""
    return maps.swapaxes(1, 2) if maps.shape[1] == maps.shape[2] else maps


class SquaresTurned(Reference):
    """Adds the transposed attention to x on square maps, as a layer that flattens as (H, W) and unflattens as (W, H)."""

    def forward(self, model: Model, x: Array) -> Array:
        return _turned(super().forward(model, x) - x) + x


class SquareGradientsTurned(Reference):
    def vjp(self, model: Model, x: Array, dy: Array) -> dict[str, Array]:
        found = super().vjp(model, x, dy)
        return found | {"x": _turned(found["x"])}

    def r1(self, model: Model, x: Array, w: Array) -> tuple[float, dict[str, Array]]:
        value, found = super().r1(model, x, w)
        return value, found | {"x": _turned(found["x"])}

    def vjp_of_vjp(
        self, model: Model, x: Array, dy: Array, cotangents: Mapping[str, Array]
    ) -> dict[str, Array]:
        found = super().vjp_of_vjp(model, x, dy, cotangents)
        return found | {"dy": _turned(found["dy"])}


class FirstSamplesOnly(Reference):
    """The gradients of the parameters, of the first 64 samples."""

    def vjp(self, model: Model, x: Array, dy: Array) -> dict[str, Array]:
        return super().vjp(model, x[:64], dy[:64]) | {"x": super().vjp(model, x, dy)["x"]}


class SecondDerivativesCut(Reference):
    """Second derivatives of the first 2,048 positions."""

    def r1(self, model: Model, x: Array, w: Array) -> tuple[float, dict[str, Array]]:
        value, found = super().r1(model, x, w)
        return value, self._cut(found, "x")

    def vjp_of_vjp(
        self, model: Model, x: Array, dy: Array, cotangents: Mapping[str, Array]
    ) -> dict[str, Array]:
        return self._cut(super().vjp_of_vjp(model, x, dy, cotangents), "dy")

    def _cut(self, found: dict[str, Array], name: str) -> dict[str, Array]:
        batch, height, width, channels = found[name].shape
        rows = found[name].reshape(batch, height * width, channels).copy()
        rows[:, 2048:] = 0
        return found | {name: rows.reshape(found[name].shape)}


_TURNED = named("square gradients turned", "vjp", SquareGradientsTurned)

MUTANTS: tuple[Mutant, ...] = (
    named("square maps turned", "forward", SquaresTurned),
    _TURNED,
    replace(_TURNED, name="square gradients of R1 turned", family="r1"),
    replace(_TURNED, name="square second derivatives turned", family="mixed"),
    edited(
        "rows of a square map indexed as w·H + h, y right",
        "map",
        (
            _RETURNED_MAP,
            (
                "side = x.shape[1]; rows = np.arange(layer.A.shape[1]).reshape(x.shape[1:3]); "
                "return layer.A[:, rows.T.ravel() if side == x.shape[2] else rows.ravel()].astype(layer.dtype)"
            ),
        ),
    ),
    edited(
        "windows of square maps in column order",
        "map",
        (
            _WINDOWS,
            f"{_WINDOWS.replace('.swapaxes(1, 2)', '.transpose((2, 0, 1, 3) if down == across else (0, 2, 1, 3))')}",
        ),
    ),
    edited(
        "no last block where it is whole",
        "forward",
        (_O, f"{_O}; self.o[:, -8:] *= self.o.shape[1] % 16 != 0"),
    ),
    edited(
        "third block of 512 keys left out",
        "large",
        (_MAP, _MASKED.format("(m < 1024) | (m >= 1536)")),
    ),
    edited("keys beyond 2,048 masked", "large", (_MAP, _MASKED.format("m < 2048"))),
    edited(
        "ragged tail of keys left out of more than 2²² scores",
        "large",
        (_MAP, _MASKED.format("(scores[0].size <= 2**22) | (m < scores.shape[2] // 64 * 64)")),
    ),
    edited(
        "ragged tail of queries left out beyond 2,048 rows",
        "large",
        (_O, f"{_O}; n = self.o.shape[1]; self.o[:, n // 64 * 64 if n > 2048 else n :] = 0"),
    ),
    edited(
        "weights rounded to 16 bits beyond 2²² of them",
        "large",
        (
            _O,
            (
                "half = self.A[0].size > 2**22; "
                "self.o = self.store((self.A.astype(np.float16).astype(self.arithmetic) if half else self.A) @ self.v)"
            ),
        ),
    ),
    edited(
        "map rounded to 16 bits beyond 2²² entries, y right",
        "large",
        (
            _RETURNED_MAP,
            "return (layer.A.astype(np.float16) if layer.A[0].size > 2**22 else layer.A).astype(layer.dtype)",
        ),
    ),
    edited(
        "float64 computed in float32 beyond 2,048 rows",
        "large",
        (
            _O,
            (
                "narrow = np.float32 if self.A.shape[1] > 2048 else self.arithmetic; "
                "self.o = self.store(self.A.astype(narrow) @ self.v.astype(narrow))"
            ),
        ),
    ),
    edited("only the first 256 channels of the value", "large", (_O, f"{_O}; self.o[..., 256:] = 0")),
    edited("only the first 512 channels of the value", "large", (_O, f"{_O}; self.o[..., 512:] = 0")),
    edited(
        "only the first 128 channels of query and key",
        "large",
        (_MAP, "self.A = _softmax(self.q[..., :128] @ _transpose(self.k[..., :128]))"),
    ),
    edited("only the first 16 samples attend", "large", (_O, f"{_O}; self.o[16:] = 0")),
    edited("only the first 64 samples attend", "large", (_O, f"{_O}; self.o[64:] = 0")),
    named("kernel gradients of the first 64 samples", "large", FirstSamplesOnly),
    named("second derivatives of the first 2,048 positions", "large", SecondDerivativesCut),
)
"""Those of the family "large" need its sizes. The others need a map that is square, or 16 positions."""
