"""The numbers of a probe: the weights of its layers, its inputs and its cotangents. Equal probes give equal bits."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from selfattn_core import spectral_norm
from selfattn_core.arrays import Array
from selfattn_core.conformance.cases.case import SIXTEEN_BITS
from selfattn_core.conformance.cases.inputs import Inputs, rounded
from selfattn_core.conformance.search.probe import Probe, Step
from selfattn_core.params import parameter_table, projections

__all__ = ["Material", "UndecidedError", "given_to", "material"]

_REDRAWS = 200
_CLEAR = 16 * 2.0**-23
"""The least lead in a pooling window, as a share of the sum of absolute terms: several times what float32 rounds."""

_LEAST_SHARE = 0.05
"""The least share of a kernel's norm that a random state estimates. A smaller one only magnifies rounding."""


class UndecidedError(ValueError):
    """Two correct implementations could choose other winners of a pooling window of this probe."""


@dataclass(frozen=True)
class Material:
    """The numbers of a probe, in its dtype.

    Args:
        layers: the weights of both layers.
        x: both inputs.
        dy: the gradient of y for each input.
        cotangents: those of the first derivatives, for each input, with the map's own under "x".
        refilled: other numbers for the first input.
    """

    layers: tuple[Mapping[str, Array], Mapping[str, Array]]
    x: tuple[Array, Array]
    dy: tuple[Array, Array]
    cotangents: tuple[Mapping[str, Array], Mapping[str, Array]]
    refilled: Array


def given_to(step: Step, numbers: Material, params: Mapping[str, Array]) -> Inputs:
    """The input of one step, for a layer with these weights.

    Args:
        step: the step.
        numbers: the numbers of its probe.
        params: the weights and the state of the layer that it asks.
    """
    index = 1 if step.place == "input" else 0
    return Inputs(
        params, numbers.x[index], numbers.dy[index], numbers.refilled, cotangents=numbers.cotangents[index]
    )


@lru_cache(maxsize=8)
def material(probe: Probe, dtype: str = "") -> Material:
    """The numbers of a probe.

    Args:
        probe: the probe.
        dtype: the dtype of the arrays. By default that of the probe. In 16 bits they are float32 arrays whose values the
            format can represent.

    Raises:
        UndecidedError: if no draw of the probe has clear winners in all pooling windows.
    """
    dtype = dtype or probe.dtype
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([probe.seed, 17])))
    first, second = _weights(probe, generator), _weights(probe, generator)
    shapes = [(*shape, probe.channels) for shape in (probe.shape, probe.other_shape)]
    x = [_maps(probe, shape, generator) for shape in shapes]
    refilled = _maps(probe, shapes[0], generator)
    dy = [_gradient(probe, shape, generator) for shape in shapes]
    cotangents = [_cotangents(probe, first, shape, generator) for shape in shapes]
    if probe.pool > 1 and probe.rows != "integers":
        both = (first, second)
        x = [_clear(probe, both, maps, generator) for maps in x]
        refilled = _clear(probe, both, refilled, generator)
    if probe.poison:
        poisoned = (x if probe.poison == "x" else dy)[0]
        if poisoned.size:
            poisoned.reshape(-1)[generator.integers(poisoned.size)] = np.nan

    def cast(array: Array) -> Array:
        return _finite_rounded(array, dtype)

    def all_cast(arrays: Mapping[str, Array]) -> dict[str, Array]:
        return {name: cast(array) for name, array in arrays.items()}

    return Material(
        (all_cast(first), all_cast(second)),
        (cast(x[0]), cast(x[1])),
        (cast(dy[0]), cast(dy[1])),
        (all_cast(cotangents[0]), all_cast(cotangents[1])),
        cast(refilled),
    )


def _finite_rounded(array: Array, dtype: str) -> Array:
    if dtype in SIXTEEN_BITS:
        bad = ~np.isfinite(array)
        result = rounded(np.where(bad, 0, array), dtype)
        result[bad] = array[bad]
        return result
    return np.array(array, dtype)


def _weights(probe: Probe, generator: np.random.Generator) -> dict[str, Array]:
    config = probe.config
    spread = (probe.logits / np.sqrt(probe.qk)) ** 0.5
    of_x = 2.0**probe.x_scale
    # What each projection gives: query and key by their logits, value and out by the scale of the value.
    gives = {
        "query": spread * 2.0**probe.balance,
        "key": spread * 2.0**-probe.balance,
        "value": of_x * 2.0**probe.value_scale,
        "out": of_x * 2.0**probe.value_scale,
    }
    takes = {"out": gives["value"]}
    means = {"query": probe.query_mean, "key": probe.key_mean}
    params: dict[str, Array] = {}
    for name, row in parameter_table(config).items():
        role = name.partition(".")[0]
        if name == "gamma":
            params[name] = np.array([probe.gamma])
        elif name.endswith("kernel"):
            width = gives[role] / takes.get(role, of_x) / np.sqrt(row.shape[0])
            params[name] = generator.normal(0, 1, row.shape) * width
        else:
            drawn = generator.normal(0, 0.4, row.shape)
            params[name] = (0.0 if probe.zero_biases else drawn) * np.ones(row.shape) * gives[role]
            params[name] = params[name] + means.get(role, 0.0) * gives[role]
    if probe.rows == "positive":
        params |= {name: np.abs(value) for name, value in params.items() if name.startswith(("value", "out"))}
    for name in projections(config):
        if probe.zero in (name, "all"):
            params[f"{name}.kernel"] = np.zeros_like(params[f"{name}.kernel"])
    if probe.rows == "integers":
        params = {name: np.asarray(np.rint(value * 8) / 8) for name, value in params.items()}
    if probe.norm:
        params |= _state(probe, params, generator)
    return params


def _state(probe: Probe, params: dict[str, Array], generator: np.random.Generator) -> dict[str, Array]:
    """The state. It also scales the kernels, which change the applied ones only with u and v of unit length."""
    state: dict[str, Array] = {}
    for name in projections(probe.config):
        kernel = params[f"{name}.kernel"]
        if not kernel.any():
            state |= {
                f"{name}.u": generator.standard_normal(kernel.shape[1:]),
                f"{name}.v": generator.standard_normal(kernel.shape[:1]),
            }
            continue
        kernel = np.asarray(kernel * 2.0**probe.sigma)
        params[f"{name}.kernel"] = kernel
        u, v = spectral_norm.power_iteration(kernel, generator.standard_normal(kernel.shape[:1]))
        if probe.state == "random":
            norm = np.linalg.norm(kernel, 2)
            for _ in range(_REDRAWS):
                left, right = (_unit(generator.standard_normal((size,))) for size in kernel.shape)
                estimate = spectral_norm.sigma(kernel, right, left)
                if abs(estimate) > _LEAST_SHARE * norm:
                    u, v = right * np.sign(estimate), left
                    break
        if probe.state != "unit":
            u = u * 0.8 * 2.0**probe.sigma / spectral_norm.sigma(kernel, u, v)
        state |= {f"{name}.u": u, f"{name}.v": v}
    return state


def _unit(vector: Array) -> Array:
    return np.asarray(vector / np.linalg.norm(vector))


def _maps(probe: Probe, shape: tuple[int, ...], generator: np.random.Generator) -> Array:
    x = generator.standard_normal(shape)
    batch, height, width, channels = shape
    if probe.rows == "equal":
        x = np.array(np.broadcast_to(x[:, :1, :1], shape))
    if probe.rows == "repeated":
        flat = x.reshape(batch, height * width, channels)
        half = height * width // 2
        flat[:, half : 2 * half] = flat[:, :half]
    if probe.rows == "positive":
        x = np.abs(x)
    if probe.rows == "integers":
        return np.rint(x)
    if probe.x_view == "still" and x.size:
        x[...] = x.flat[0]
    return np.asarray((x + probe.x_mean) * 2.0**probe.x_scale)


def _gradient(probe: Probe, shape: tuple[int, ...], generator: np.random.Generator) -> Array:
    dy = generator.standard_normal(shape)
    if probe.rows == "positive":
        dy = np.abs(dy)
    if probe.dy_view == "still":
        dy = np.ones(shape)
    return np.asarray(dy * 2.0**probe.dy_scale)


def _cotangents(
    probe: Probe, params: Mapping[str, Array], shape: tuple[int, ...], generator: np.random.Generator
) -> dict[str, Array]:
    """Cotangents, each of the size of what it belongs to, so that all terms of a sum have similar sizes."""
    found: dict[str, Array] = {"x": generator.standard_normal(shape) * 2.0**probe.x_scale}
    for name, row in parameter_table(probe.config).items():
        drawn = generator.normal(0, 0.5, row.shape)
        own = (
            params.get(f"{name.partition('.')[0]}.kernel", params[name]) if name == "gamma" else params[name]
        )
        size = float(np.sqrt(np.mean(np.square(own)))) if own.size else 0.0
        found[name] = drawn * (size or 1.0)
    return found


def _clear(
    probe: Probe,
    layers: tuple[Mapping[str, Array], ...],
    x: Array,
    generator: np.random.Generator,
) -> Array:
    """The maps with other numbers in each pooling window that has no clear winner in some layer.

    Raises:
        UndecidedError: if windows stay unclear.
    """
    side = probe.pool
    _, height, width, _ = x.shape
    down, across = height // side, width // side
    for _ in range(_REDRAWS):
        unclear = _unclear(probe, layers, x)
        if not unclear.any():
            return x
        mask = np.zeros(x.shape, bool)
        spread = unclear.repeat(side, axis=1).repeat(side, axis=2)
        mask[:, : down * side, : across * side] = spread[..., None]
        x = np.where(mask, _maps(replace(probe, x_view=""), x.shape, generator), x)
    raise UndecidedError("pooling windows stay without clear winners.")


def _unclear(probe: Probe, layers: tuple[Mapping[str, Array], ...], x: Array) -> Array:
    """(B, H', W'): whether rounding could decide the window for some channel of key or value."""
    side = probe.pool
    batch, height, width, _ = x.shape
    down, across = height // side, width // side
    found = np.zeros((batch, down, across), bool)
    if not batch:
        return found
    whole = x[:, : down * side, : across * side]
    for params in layers:
        for role in ("key", "value"):
            kernel = params[f"{role}.kernel"]
            bias = np.abs(params.get(f"{role}.bias", np.zeros(kernel.shape[1])))
            values, sizes = whole @ kernel, np.abs(whole) @ np.abs(kernel) + bias
            if not kernel.any():
                continue
            gathered = [
                array.reshape(batch, down, side, across, side, -1)
                .swapaxes(2, 3)
                .reshape(batch, down, across, side * side, -1)
                for array in (values, sizes)
            ]
            ordered = np.partition(gathered[0], -2, axis=3)
            lead = ordered[..., -1, :] - ordered[..., -2, :]
            found |= (lead < _CLEAR * gathered[1].max(axis=3)).any(axis=-1)
    return found
