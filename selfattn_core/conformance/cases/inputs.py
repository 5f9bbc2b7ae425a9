"""The inputs of the cases: seeded draws. A draw is repeated if rounding could make two correct implementations disagree."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from selfattn_core import spectral_norm
from selfattn_core.arrays import Array
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.conformance.cases.case import Case
from selfattn_core.conformance.cases.copies import few, of_copies
from selfattn_core.params import parameter_table, projections

__all__ = ["Inputs", "clear_windows", "inputs", "rounded"]


@dataclass(frozen=True)
class Inputs:
    """The input of a case.

    Args:
        params: arrays by canonical name.
        x: (B, H, W, C).
        dy: the gradient of y, (B, H, W, C).
        other: a second input, with the case's `second_shape` if it has one.
        cotangents: the cotangents of the first derivatives, by name. "x" is (B, H, W, C).
    """

    params: Mapping[str, Array]
    x: Array
    dy: Array
    other: Array = field(default_factory=lambda: np.zeros(0))
    cotangents: Mapping[str, Array] = field(default_factory=dict)

    def in_float64(self) -> "Inputs":
        """The same values in float64."""

        def wide(array: Array) -> Array:
            return array.astype(np.float64)

        return Inputs(
            {name: wide(value) for name, value in self.params.items()},
            wide(self.x),
            wide(self.dy),
            wide(self.other),
            {name: wide(value) for name, value in self.cotangents.items()},
        )


def inputs(case: Case, dtype: str, seed: int = 0) -> Inputs:
    """The input of a case. Equal arguments give equal bits.

    Args:
        case: the case.
        dtype: the dtype of all arrays. For "bfloat16" and "float16" they are float32 arrays whose values the format can
            represent.
        seed: another seed gives another draw of the same design.

    Returns:
        Arrays in which rounding decides no max-pooling window. Otherwise two correct implementations that differ in the
        last bit could send a gradient to different positions. In a case of integers the exact values decide the windows,
        and 16 bits can represent these. Where logits exceed the range of 16 bits, rounding also decides no row of the map.
    """
    for attempt in range(400):
        drawn = _draw(case, [seed, attempt, *case.id.encode()])
        if _decided(case, drawn) and _clear(case, drawn) and _exact(case, drawn):
            return _rounded(drawn, dtype)
    raise AssertionError(f"{case.id}: none of 400 draws has clear winners in all pooling windows.")


def _draw(case: Case, entropy: list[int]) -> Inputs:
    if case.copies > 1:
        return _copied(case, _draw(few(case), entropy))
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
    config = case.config
    # With x of variance 1, q and k of variance v give logits of variance Dk v².
    spread = {"query": (case.logits / np.sqrt(config.qk_channels)) ** 0.5}
    spread["key"] = spread["query"]
    params = {}
    table = parameter_table(config)
    for name, row in table.items():
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
    if case.one_sign:
        x, dy = np.abs(x), np.abs(dy)
        params |= {name: np.abs(value) for name, value in params.items() if name.startswith(("value", "out"))}
    other = generator.standard_normal((*(case.second_shape or case.shape), config.channels))
    cotangents = {}
    if case.computation == "mixed":
        cotangents = {"x": generator.standard_normal(shape)}
        cotangents |= {name: generator.normal(0, 0.5, row.shape) for name, row in table.items()}
    params |= {f"{name}.kernel": np.zeros_like(params[f"{name}.kernel"]) for name in case.zero}
    params |= _state(config, params, generator)
    if case.integers:
        x = np.rint(x)
        params = {name: np.rint(value * 8) / 8 for name, value in params.items()}
    return Inputs(params, x, dy, other, cotangents)


def _copied(case: Case, drawn: Inputs) -> Inputs:
    """The input of a case with copies, from that of its few positions."""
    cotangents = {
        name: of_copies(case, value) if name == "x" else value for name, value in drawn.cotangents.items()
    }
    x, dy, other = (of_copies(case, each) for each in (drawn.x, drawn.dy, drawn.other))
    return Inputs(drawn.params, x, dy, other, cotangents)


def _state(
    config: SelfAttentionConfig, params: Mapping[str, Array], generator: np.random.Generator
) -> dict[str, Array]:
    """A state that has not converged and does not have unit length. The layer applies the drawn kernel divided by 0.8.

    A kernel of zeros gets the state before any iteration.
    """
    state: dict[str, Array] = {}
    for name in projections(config) if config.spectral_norm else ():
        kernel = params[f"{name}.kernel"]
        start = generator.standard_normal(kernel.shape[:1])
        if not kernel.any():
            state |= {f"{name}.u": generator.standard_normal(kernel.shape[1:]), f"{name}.v": start}
            continue
        u, v = spectral_norm.power_iteration(kernel, start)
        state |= {f"{name}.u": u * 0.8 / spectral_norm.sigma(kernel, u, v), f"{name}.v": v}
    return state


def rounded(array: Array, dtype: str) -> Array:
    """An array in a dtype. For "bfloat16" and "float16" it is a float32 array whose values the format can represent.

    Args:
        array: finite numbers of any shape.
        dtype: one of `DTYPES`.

    Example:
        >>> rounded(np.array([1 + 2**-8, 1 + 3 * 2**-8]), "bfloat16")
        array([1.      , 1.015625], dtype=float32)
    """
    if dtype == "float16":
        return array.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(array, np.float32).view(np.uint32).astype(np.uint64)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return even.astype(np.uint32).view(np.float32).reshape(array.shape)
    return np.array(array, dtype)


def _rounded(drawn: Inputs, dtype: str) -> Inputs:
    def cast(array: Array) -> Array:
        return rounded(array, dtype)

    return Inputs(
        {name: cast(value) for name, value in drawn.params.items()},
        cast(drawn.x),
        cast(drawn.dy),
        cast(drawn.other),
        {name: cast(value) for name, value in drawn.cotangents.items()},
    )


def _decided(case: Case, drawn: Inputs) -> bool:
    """Whether the largest value of every window leads by far more than float32 rounding."""
    return case.integers or clear_windows(case.config, drawn.params, drawn.x, 1e-4)


def _exact(case: Case, drawn: Inputs) -> bool:
    """Whether bfloat16 can represent the projections of a case of integers: multiples of 1/8 up to 32, which need 8 bits."""
    if not case.integers or not case.narrow:
        return True
    projected = (
        drawn.x @ drawn.params[f"{role}.kernel"] + drawn.params.get(f"{role}.bias", 0)
        for role in ("query", "key", "value")
    )
    return all(np.abs(values).max(initial=0) <= 32 for values in projected)


def clear_windows(config: SelfAttentionConfig, params: Mapping[str, Array], x: Array, margin: float) -> bool:
    """Whether the largest value of every pooling window of key and value leads by at least `margin`.

    Args:
        config: the layer. Without pooling the answer is True.
        params: its weights.
        x: feature maps (B, H, W, C).
        margin: the absolute lead, which should be far larger than rounding.

    Example:
        >>> config = SelfAttentionConfig(8, kv_pool=2)
        >>> tied = np.ones((1, 2, 2, 8))
        >>> clear_windows(config, inputs(Case("", "forward", "", config), "float64").params, tied, 1e-4)
        False
    """
    side = config.kv_pool
    if side == 1:
        return True
    _, height, width, _ = x.shape
    down, across = height // side, width // side
    for role in ("key", "value"):
        values = x.astype(np.float64) @ params[f"{role}.kernel"].astype(np.float64)
        whole = values[:, : down * side, : across * side]
        windows = whole.reshape(-1, down, side, across, side, values.shape[-1]).swapaxes(2, 3)
        # Partition so that the two largest values of each window are the last two.
        ordered = np.partition(windows.reshape(*windows.shape[:3], side * side, values.shape[-1]), -2, axis=3)
        if ordered.size and (ordered[..., -1, :] - ordered[..., -2, :]).min() < margin:
            return False
    return True


def _clear(case: Case, drawn: Inputs) -> bool:
    """Whether one logit of every row wins clearly, if logits are so large that rounding q and k moves them by units."""
    if case.logits < 1e4:
        return True
    x = drawn.x.reshape(drawn.x.shape[0], -1, case.config.channels)
    q, k = (x @ drawn.params[f"{role}.kernel"] + drawn.params[f"{role}.bias"] for role in ("query", "key"))
    ordered = np.sort(q @ k.swapaxes(1, 2), axis=-1)
    return bool((ordered[..., -1] - ordered[..., -2]).min() > 500)
