"""The table of all cases, as data.

Every input can reveal bugs. It is seeded and random, all axes have different sizes, biases and gamma are not zero, and
logits are about 8 so that the map is far from uniform. The exceptions are cases named after an edge, such as one position,
gamma 0 or a constant input.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np

from selfattn_core.config import SelfAttentionConfig
from selfattn_core.conformance.cases.case import LAYOUTS, SIXTEEN_BITS, Case, Run
from selfattn_core.conformance.cases.computations import ComputationName
from selfattn_core.conformance.cases.families import FamilyName, Level
from selfattn_core.params import projections

__all__ = ["CASES", "all_runs"]


_FLAT = SelfAttentionConfig(24)
_POOLED = SelfAttentionConfig.pooled(16)

_LAYERS: tuple[tuple[str, SelfAttentionConfig], ...] = (
    ("flat form", _FLAT),
    ("official pooled form, odd map", _POOLED),
    ("flat without biases", SelfAttentionConfig(10, 3, use_bias=False)),
    ("out projection, narrow value", SelfAttentionConfig(11, 3, 6, out_projection=True)),
    ("out projection, wide value", SelfAttentionConfig(6, 4, 9, out_projection=True)),
    ("pooled with biases", SelfAttentionConfig(12, 3, 5, out_projection=True, kv_pool=2)),
    ("pooled by 3, no out projection", SelfAttentionConfig(9, 2, kv_pool=3)),
    ("one-channel query", SelfAttentionConfig(13, 1)),
)
_SHAPES: tuple[tuple[str, SelfAttentionConfig, tuple[int, int, int]], ...] = (
    ("one position", _FLAT, (2, 1, 1)),
    ("one row", _FLAT, (2, 1, 9)),
    ("one column", _FLAT, (3, 8, 1)),
    ("batch of one", _FLAT, (1, 6, 4)),
    ("empty batch", _FLAT, (0, 5, 7)),
    ("one pooled key", _POOLED, (2, 2, 3)),
    ("even map, pooled", _POOLED, (3, 4, 6)),
    ("empty batch, pooled", _POOLED, (0, 4, 6)),
)
# Drawn once and then fixed, because ids are permanent.
_DRAWN: tuple[tuple[str, SelfAttentionConfig, tuple[int, int, int]], ...] = (
    (
        "drawn: query wider than value",
        SelfAttentionConfig(14, 5, 3, out_projection=True, kv_pool=2),
        (3, 6, 5),
    ),
    ("drawn: two keys in a row", SelfAttentionConfig(7, 2, use_bias=False, kv_pool=2), (4, 3, 5)),
    (
        "drawn: no biases, flat",
        SelfAttentionConfig(17, 6, 11, out_projection=True, use_bias=False),
        (4, 3, 2),
    ),
    (
        "drawn: query wider than input, pooled by 3",
        SelfAttentionConfig(5, 9, 2, out_projection=True, kv_pool=3),
        (2, 7, 10),
    ),
    ("square out projection", SelfAttentionConfig(10, 3, out_projection=True), (2, 5, 7)),
)
# Where H = W, a layer that exchanges them is right everywhere else. 16 positions are whole blocks of 2, 4, 8 and 16.
_SQUARE: tuple[tuple[str, SelfAttentionConfig, tuple[int, int, int]], ...] = (
    ("square map of 16 positions", _FLAT, (3, 4, 4)),
    ("square map of 16 positions, pooled", _POOLED, (2, 4, 4)),
)
# More positions than a query block has, and not a multiple of it.
_LARGE: tuple[tuple[str, SelfAttentionConfig, tuple[int, int, int]], ...] = (
    ("several blocks of query rows", SelfAttentionConfig(6, 2), (1, 37, 41)),
    (
        "several blocks of query rows, pooled",
        SelfAttentionConfig(6, 2, 3, out_projection=True, kv_pool=2),
        (1, 53, 59),
    ),
)
# Wider than the vectors, tiles and heads of kernels, with more samples than a chunk of a batch may have.
_WIDE: tuple[tuple[str, SelfAttentionConfig, tuple[int, int, int]], ...] = (
    ("wide, nine samples", SelfAttentionConfig(136), (9, 3, 4)),
    (
        "wide query and value, pooled",
        SelfAttentionConfig(67, 35, 70, out_projection=True, kv_pool=2),
        (3, 4, 6),
    ),
)
# Beyond sizes at which kernels change: five blocks of 512 query rows, the last of them ragged, and more than 2²² scores; a
# query of more than 128 channels and a value of more than 512; more than 64 samples.
_LARGER: tuple[
    tuple[str, SelfAttentionConfig, tuple[int, int, int], tuple[tuple[ComputationName, bool], ...]], ...
] = (
    (
        "2,115 positions",
        SelfAttentionConfig(8, 2),
        (1, 45, 47),
        (("forward", True), ("map", False), ("vjp", True), ("r1", False), ("mixed", False)),
    ),
    (
        "130 channels of query and 520 of value",
        SelfAttentionConfig(21, 130, 520, out_projection=True),
        (2, 5, 7),
        (("forward", False), ("vjp", False), ("mixed", False)),
    ),
    (
        "67 samples",
        SelfAttentionConfig(10, 3),
        (67, 1, 7),
        (("forward", False), ("vjp", False), ("r1", False)),
    ),
)
# Compilers need most of the time, for each size, dtype and layout. So float64 and the second layout are asked of every
# quantity, but not of every layer and size: what they can get wrong is in each form of the layer, and the search draws them
# at all sizes. If compilers need seconds for a case, it runs only in the dtype that every backend has.
_BOTH = ("float32", "float64")
_ONE_DTYPE = ("float32",)
_FORMS = (0, 1, 5)
"""The flat and the official form, and pooling with biases, in `_LAYERS`."""
_LATE_FORMS = (2, 3, 4, 7)
"""The forms of `_LAYERS` whose second derivatives only the level deploy asks. Their parts are in the others."""
_LATE_SHAPES = (1, 2, 3)
"""The sizes of `_SHAPES` that only the level deploy asks. At the others something cancels, is empty, or fits windows."""
_LATE_MIXED = (
    *(_LAYERS[index][0] for index in (*_LATE_FORMS, 6)),
    _SHAPES[6][0],
    *(title for title, _, _ in _LARGE),
)
"""The mixed second derivatives that only the level deploy asks. R1 is asked at these sizes before."""
_FIRST: tuple[ComputationName, ...] = ("forward", "vjp")
_TRAINED: tuple[tuple[str, SelfAttentionConfig, tuple[int, int, int]], ...] = (
    ("flat form", SelfAttentionConfig(16), (3, 4, 5)),
    ("pooled form", SelfAttentionConfig.pooled(16), (2, 4, 5)),
)
_OPTIMIZERS: tuple[tuple[Literal["momentum", "adam"], str], ...] = (
    ("momentum", "SGD with momentum"),
    ("adam", "Adam"),
)
# What later calls see of the state that a training pass leaves, and a second pass goes on from.
_AFTER_PASSES: tuple[tuple[ComputationName, int, tuple[str, ...]], ...] = (
    ("forward", 1, _BOTH),
    ("map", 2, _ONE_DTYPE),
    ("vjp", 2, _ONE_DTYPE),
    ("r1", 1, _ONE_DTYPE),
    ("mixed", 2, _ONE_DTYPE),
    ("params", 1, _ONE_DTYPE),
    ("spectral_norm", 1, _BOTH),
    ("training_vjp", 1, _ONE_DTYPE),
    ("saved", 2, _ONE_DTYPE),
)
_TIES = "equal values in a pooling window: the first wins"
_CROPPED = SelfAttentionConfig(12, 3, 5, out_projection=True, kv_pool=2)


def _rows() -> Iterator[Case]:
    def everywhere(family: FamilyName, ids: Iterator[str]) -> Iterator[Case]:
        for index, (title, config) in enumerate(_LAYERS):
            # The map has no layout, and second derivatives are those of what the first ones have passed through.
            once = family in ("map", "r1")
            dtypes = _BOTH if index in _FORMS[: 2 if family == "r1" else 3] else _ONE_DTYPE
            one = index > 0 if once else index not in _FORMS
            late = family == "r1" and index in _LATE_FORMS
            yield Case(next(ids), family, title, config, dtypes=dtypes, one_layout=one, late=late)
        for index, (title, config, shape) in enumerate(_SHAPES):
            late = index in _LATE_SHAPES
            yield Case(next(ids), family, title, config, shape, dtypes=_ONE_DTYPE, one_layout=True, late=late)

    def further(family: FamilyName, ids: Iterator[str]) -> Iterator[Case]:
        for title, config, shape in _DRAWN:
            late = title.startswith("drawn")
            yield Case(next(ids), family, title, config, shape, dtypes=_ONE_DTYPE, one_layout=True, late=late)
        # The attention map is not computed in blocks, and R1 of the large pooled layer takes long.
        for title, config, shape in _LARGE[: 2 if family in ("forward", "vjp") else 1]:
            yield Case(next(ids), family, title, config, shape, dtypes=_ONE_DTYPE, one_layout=True)

    def square(family: FamilyName, ids: Iterator[str]) -> Iterator[Case]:
        for title, config, shape in _SQUARE:
            one = family != "forward" or config is _POOLED
            late = family == "r1" and config is _POOLED
            yield Case(next(ids), family, title, config, shape, dtypes=_ONE_DTYPE, one_layout=one, late=late)

    ids = _number("FWD")
    yield from everywhere("forward", ids)
    yield Case(next(ids), "forward", "gamma 0: the identity", _FLAT, gamma=0.0)
    yield Case(next(ids), "forward", "negative gamma", _POOLED, gamma=-0.7)
    yield Case(next(ids), "forward", "large logits", _FLAT, logits=120.0)
    yield Case(next(ids), "forward", "constant input", _FLAT, constant=True)
    yield from (*further("forward", ids), *_views("forward", ids), *_unusual("forward", ids))
    yield from square("forward", ids)
    ids = _number("MAP")
    yield from everywhere("map", ids)
    yield Case(next(ids), "map", "large logits", _FLAT, logits=120.0)
    yield Case(next(ids), "map", "constant input: a uniform map", _FLAT, constant=True)
    yield from (*further("map", ids), _one_sided("map", ids), *square("map", ids))
    yield from _related()
    ids = _number("VJP")
    yield from everywhere("vjp", ids)
    yield Case(next(ids), "vjp", "gamma 0: only gamma has a gradient", _FLAT, gamma=0.0)
    yield Case(next(ids), "vjp", "negative gamma", _POOLED, gamma=-0.7)
    yield from further("vjp", ids)
    yield Case(next(ids), "vjp", _TIES, _LAYERS[5][1], integers=True)
    title, config = f"{_TIES}, by 3", _LAYERS[6][1]
    yield Case(next(ids), "vjp", title, config, (2, 7, 10), integers=True, dtypes=_ONE_DTYPE, one_layout=True)
    yield from (*_views("vjp", ids), *_unusual("vjp", ids), _left_alone("vjp", ids), *square("vjp", ids))
    ids = _number("GAN")
    yield from everywhere("r1", ids)
    yield Case(next(ids), "r1", "gamma 0", _FLAT, gamma=0.0)
    yield Case(next(ids), "r1", "negative gamma", _POOLED, gamma=-0.7)
    yield from (*further("r1", ids), _left_alone("r1", ids), *square("r1", ids))
    yield from _mixed(_number("MIX"))
    ids = _number("PAR")
    for title, config in _LAYERS:
        yield Case(next(ids), "params", title, config)
    ids = _number("INI")
    for title, config in (
        ("flat", SelfAttentionConfig(48)),
        ("pooled", SelfAttentionConfig.pooled(64)),
        ("out projection with biases", SelfAttentionConfig(40, 10, 30, out_projection=True)),
    ):
        yield Case(next(ids), "init", f"distribution of a new layer: {title}", config, dtypes=_ONE_DTYPE)
    yield from (*_trajectories(_number("TRN")), *_spectral(_number("SPN")), *_deploy())


def _related() -> Iterator[Case]:
    """Several calls of one layer, whose answers depend on one another or do not."""
    ids = _number("SIZ")
    for title, config, second in (
        ("another size and back", _FLAT, (3, 4, 6)),
        ("another size and back, pooled", _POOLED, (1, 4, 9)),
    ):
        yield Case(next(ids), "sizes", title, config, dtypes=_ONE_DTYPE, second_shape=second, one_layout=True)
    ids = _number("BAT")
    for title, config in (_LAYERS[0], _LAYERS[5]):
        described = f"the first sample is exchanged: {title}"
        yield Case(next(ids), "batch", described, config, (3, 5, 7), dtypes=_ONE_DTYPE, one_layout=True)
    ids = _number("EQV")
    for (title, config), dtypes in ((_LAYERS[0], _BOTH), (_LAYERS[3], _ONE_DTYPE)):
        described, one = f"positions permuted: {title}", config is not _FLAT
        yield Case(next(ids), "permutation", described, config, dtypes=dtypes, one_layout=one)
    ids = _number("DET")
    for title, config in (_LAYERS[0], _LAYERS[5]):
        yield Case(next(ids), "determinism", f"again, and built again: {title}", config)
    ids = _number("NAN")
    for title, config, gamma, poison in (
        ("NaN: its own sample, nowhere else", _FLAT, 0.7, ((1, 2, 3, 4), np.nan)),
        ("NaN in a pooling window", _POOLED, 0.7, ((0, 3, 2, 5), np.nan)),
        ("NaN beyond the last window: its own position", _CROPPED, 0.7, ((1, 4, 6, 2), np.nan)),
        ("infinity", _FLAT, 0.7, ((0, 1, 5, 3), np.inf)),
        ("NaN at gamma 0", _FLAT, 0.0, ((1, 0, 6, 7), np.nan)),
    ):
        yield Case(next(ids), "nonfinite", title, config, gamma=gamma, poison=poison)


def _mixed(ids: Iterator[str]) -> Iterator[Case]:
    for title, config, shape, gamma, dtypes in (
        *((title, config, (2, 5, 7), 0.7, _BOTH) for title, config in _LAYERS[:2]),
        *((title, config, (2, 5, 7), 0.7, _ONE_DTYPE) for title, config in _LAYERS[2:]),
        *((title, config, shape, 0.7, _ONE_DTYPE) for title, config, shape in (_SHAPES[0], _SHAPES[6])),
        ("gamma 0", _CROPPED, (2, 5, 7), 0.0, _BOTH),
        *((title, config, shape, 0.7, _ONE_DTYPE) for title, config, shape in (*_LARGE, _SQUARE[0])),
    ):
        described = f"cotangents of every first derivative: {title}"
        one = config is not _FLAT or shape != (2, 5, 7)
        late = title in _LATE_MIXED
        yield Case(
            next(ids), "mixed", described, config, shape, gamma, dtypes=dtypes, one_layout=one, late=late
        )


def _number(prefix: str) -> Iterator[str]:
    return (f"SA-{prefix}-{index:03d}" for index in range(1, 1000))


def _views(family: FamilyName, ids: Iterator[str]) -> Iterator[Case]:
    dtypes = _ONE_DTYPE if family == "vjp" else ("float32", "float64")
    yield Case(next(ids), family, "a strided view", _LAYERS[0][1], dtypes=dtypes, view="strided")
    yield Case(next(ids), family, "a transposed view", _LAYERS[5][1], dtypes=dtypes, view="transposed")


def _unusual(family: FamilyName, ids: Iterator[str]) -> Iterator[Case]:
    """Cases with larger widths, batches, gains, windows and logits than the other cases."""
    for title, config, shape in _WIDE:
        late = family == "vjp"
        yield Case(next(ids), family, title, config, shape, dtypes=_ONE_DTYPE, one_layout=True, late=late)
    title, config = "pooled by 4, gamma above 1", SelfAttentionConfig(8, 3, kv_pool=4)
    yield Case(next(ids), family, title, config, (2, 9, 10), 2.5, dtypes=_ONE_DTYPE, one_layout=True)
    yield _one_sided(family, ids)


def _one_sided(family: FamilyName, ids: Iterator[str]) -> Case:
    """A case with two keys, in which both logits of some rows are far below zero."""
    _, config, shape = _DRAWN[1]
    title = "large logits of two keys"
    return Case(next(ids), family, title, config, shape, logits=120.0, dtypes=_ONE_DTYPE, one_layout=True)


def _left_alone(family: FamilyName, ids: Iterator[str]) -> Case:
    title = "derivatives leave the layer, their arguments and earlier answers as they were"
    return Case(next(ids), family, title, _CROPPED, of="evaluation", dtypes=_ONE_DTYPE, one_layout=True)


def _trajectories(ids: Iterator[str]) -> Iterator[Case]:
    for form, config, shape in _TRAINED:
        for optimizer, title in _OPTIMIZERS:
            yield Case(
                next(ids), "trajectory", f"{title}, {form}", config, shape, 0.5, 1.5, optimizer=optimizer
            )


def _spectral(ids: Iterator[str]) -> Iterator[Case]:
    flat = SelfAttentionConfig(11, 3, spectral_norm=True)
    full = SelfAttentionConfig(12, 3, 5, out_projection=True, kv_pool=2, spectral_norm=True)
    every: tuple[ComputationName, ...] = ("forward", "map", "vjp", "r1", "mixed", "params", "spectral_norm")
    for title, config in (("flat", flat), ("pooled with out projection", full)):
        for of in every if config is full else ("vjp", "spectral_norm"):
            described: str = "one training pass moves the state once" if of == "spectral_norm" else of
            title_ = f"{described}: {title}"
            one = of not in ("forward", "vjp")
            dtypes: tuple[str, ...] = _BOTH if config is full else _ONE_DTYPE
            yield Case(next(ids), "spectral_norm", title_, config, of=of, dtypes=dtypes, one_layout=one)
    title = "forward and vjp leave the state where it is: pooled with out projection"
    yield Case(next(ids), "spectral_norm", title, full, of="evaluation", dtypes=_ONE_DTYPE, one_layout=True)
    wide = SelfAttentionConfig(40, 10, 30, out_projection=True, spectral_norm=True)
    after = "vjp of a training pass, of the state after it"
    further: tuple[tuple[ComputationName, str, SelfAttentionConfig, tuple[str, ...]], ...] = (
        ("training_vjp", f"{after}: flat", flat, _ONE_DTYPE),
        ("training_vjp", f"{after}: pooled with out projection", full, _BOTH),
        ("saved", "the framework's own file: pooled with out projection", full, _BOTH),
        ("init", "weights and state of a new layer: out projection with biases", wide, _ONE_DTYPE),
    )
    for of, title, config, dtypes in further:
        late = of == "saved"
        yield Case(
            next(ids), "spectral_norm", title, config, of=of, dtypes=dtypes, one_layout=True, late=late
        )
    yield from _of_zeros(ids)
    yield from _official_and_normalised(ids)
    for of, passes, dtypes in _AFTER_PASSES:
        times = "two training passes" if passes == 2 else "a training pass"
        described = "another pass" if of == "spectral_norm" else of
        title = f"{described} after {times}: pooled with out projection"
        yield Case(
            next(ids),
            "spectral_norm",
            title,
            full,
            of=of,
            dtypes=dtypes,
            one_layout=True,
            late=of in ("map", "r1", "mixed", "saved"),
            passes=passes,
        )
    title = "forward: pooled with out projection"
    yield Case(next(ids), "spectral_norm", title, full, dtypes=SIXTEEN_BITS, late=True)


def _official_and_normalised(ids: Iterator[str]) -> Iterator[Case]:
    """The layer of the published GANs. It has no biases, and each of its kernels is normalised."""
    config = SelfAttentionConfig.pooled(16, spectral_norm=True)
    rows: tuple[tuple[ComputationName, str, tuple[str, ...]], ...] = (
        ("forward", "forward", _BOTH),
        ("vjp", "vjp", _BOTH),
        ("r1", "r1", _ONE_DTYPE),
        ("mixed", "mixed", _ONE_DTYPE),
        ("spectral_norm", "one training pass", _BOTH),
        ("training_vjp", "vjp of a training pass", _BOTH),
    )
    for of, title, dtypes in rows:
        described, late = f"{title}: official pooled form", of not in ("forward", "training_vjp")
        yield Case(
            next(ids), "spectral_norm", described, config, of=of, dtypes=dtypes, one_layout=True, late=late
        )


def _of_zeros(ids: Iterator[str]) -> Iterator[Case]:
    """Cases with one kernel of zeros, because more would make other gradients zero, and one case with all kernels zero."""
    config = SelfAttentionConfig(12, 3, 5, out_projection=True, spectral_norm=True)
    all_of_them = tuple(projections(config))
    rows: tuple[tuple[ComputationName, str, tuple[str, ...]], ...] = (
        ("spectral_norm", "one training pass", ("query",)),
        ("training_vjp", "vjp of a training pass", ("query",)),
        ("training_vjp", "vjp of a training pass", ("out",)),
        ("r1", "r1", ("out",)),
        ("mixed", "mixed", ("query",)),
        ("spectral_norm", "one training pass", all_of_them),
    )
    for of, title, zero in rows:
        described = f"{title}, kernels of zeros: {', '.join(zero)}"
        dtypes = _BOTH if of == "spectral_norm" else _ONE_DTYPE
        late = of != "spectral_norm"
        yield Case(
            next(ids),
            "spectral_norm",
            described,
            config,
            of=of,
            dtypes=dtypes,
            zero=zero,
            one_layout=True,
            late=late,
        )


def _deploy() -> Iterator[Case]:
    ids = _number("DTY")
    for title, config in (_LAYERS[0], _LAYERS[1], _LAYERS[4]):
        yield Case(next(ids), "dtype", f"float32 logits: {title}", config, logits=8.0, dtypes=SIXTEEN_BITS)
    yield _overflowing("dtype", ids)
    for title, config in (_LAYERS[0], _LAYERS[1]):
        yield Case(
            next(ids), "dtype", f"float32 logits: {title}", config, logits=8.0, of="map", dtypes=SIXTEEN_BITS
        )
    exact: tuple[tuple[str, SelfAttentionConfig, ComputationName], ...] = (
        (*_LAYERS[0], "forward"),
        (*_LAYERS[5], "forward"),
        (*_LAYERS[0], "map"),
    )
    for title, config, of in exact:
        # Query and key are exact, so that only the logits can be rounded before the softmax.
        described = f"float32 logits of exact queries and keys: {title}"
        yield Case(
            next(ids), "dtype", described, config, logits=30.0, integers=True, of=of, dtypes=SIXTEEN_BITS
        )
    yield from _gradients_in_16_bits(ids)
    ids = _number("CMP")
    for title, config in (_LAYERS[0], _LAYERS[5]):
        yield Case(next(ids), "compiled", title, config, dtypes=_BOTH)
        yield Case(next(ids), "compiled", f"gradients: {title}", config, of="vjp", dtypes=_BOTH)
    # Frameworks compute a layer as a whole or operation by operation. A model from `build` does only one of the two.
    usual, empty = (2, 5, 7), (0, 4, 6)
    uncompiled: tuple[tuple[ComputationName, str, SelfAttentionConfig, tuple[int, int, int]], ...] = (
        ("forward", *_LAYERS[5], usual),
        ("vjp", *_LAYERS[0], usual),
        ("vjp", *_LAYERS[5], usual),
        ("map", *_LAYERS[5], usual),
        *((of, "empty batch, pooled", _POOLED, empty) for of in _FIRST),
        *((of, *_LARGE[1]) for of in _FIRST),
    )
    for of, title, config, shape in uncompiled:
        described = f"{of} operation by operation: {title}"
        dtypes = _BOTH if shape == usual else _ONE_DTYPE
        yield Case(next(ids), "compiled", described, config, shape, of=of, dtypes=dtypes, eager=True)
    yield _overflowing("compiled", ids)
    ids = _number("SAV")
    for title, config in (_LAYERS[0], _LAYERS[1], _LAYERS[4]):
        yield Case(next(ids), "saved", f"the framework's own file: {title}", config)
    yield Case(
        next(ids), "saved", f"the framework's own file: {_LAYERS[4][0]}", _LAYERS[4][1], dtypes=SIXTEEN_BITS
    )
    ids = _number("PSG")
    for title, config in (_LAYERS[0], _LAYERS[5]):
        yield Case(
            next(ids),
            "per_sample",
            f"gradients of each sample: {title}",
            config,
            (3, 5, 7),
            dtypes=_BOTH,
        )
    yield from _large(_number("LRG"))
    ids = itertools.islice(_number("MEM"), 3, None)
    orders: tuple[ComputationName, ...] = ("forward", "vjp", "r1")
    for of in orders:
        title = f"{of}: right, in less than one N×N array"
        config = SelfAttentionConfig(8, 2)
        yield Case(next(ids), "memory", title, config, (1, 64, 96), of=of, dtypes=_ONE_DTYPE, copies=64)
    ids = _number("SHP")
    # Sizes that suit the accelerator units that round operands. The derivatives use
    # no pooling, because rounding would choose its winners.
    shipped: tuple[tuple[str, SelfAttentionConfig, ComputationName], ...] = (
        ("forward, flat form", SelfAttentionConfig(64, 16), "forward"),
        ("forward, official pooled form", SelfAttentionConfig.pooled(64), "forward"),
        ("map", SelfAttentionConfig(64, 16), "map"),
        ("gradients", SelfAttentionConfig(64, 16, 32, out_projection=True), "vjp"),
        ("R1", SelfAttentionConfig(64, 16), "r1"),
    )
    for title, config, of in shipped:
        described = f"as the framework computes by default: {title}"
        yield Case(next(ids), "shipped", described, config, (3, 8, 12), of=of, dtypes=_ONE_DTYPE)


def _overflowing(family: FamilyName, ids: Iterator[str]) -> Case:
    title = "logits beyond what 16 bits hold"
    return Case(next(ids), family, title, _FLAT, (2, 3, 4), logits=3e4, dtypes=("float16",))


def _large(ids: Iterator[str]) -> Iterator[Case]:
    for title, config, shape, asked in _LARGER:
        for of, both in asked:
            yield Case(
                next(ids),
                "large",
                f"{of}: {title}",
                config,
                shape,
                of=of,
                dtypes=_BOTH if both else _ONE_DTYPE,
            )


def _gradients_in_16_bits(ids: Iterator[str]) -> Iterator[Case]:
    for title, config in (_LAYERS[0], _LAYERS[4]):
        yield Case(next(ids), "dtype", f"gradients: {title}", config, of="vjp", dtypes=SIXTEEN_BITS)
    for title, config in (_LAYERS[1], _LAYERS[5]):
        # Without exact values, rounding would decide the windows.
        described = f"gradients, {_TIES}: {title}"
        yield Case(next(ids), "dtype", described, config, of="vjp", dtypes=SIXTEEN_BITS, integers=True)
    # Only rows with two nearly equal keys show how the logits were rounded, so the batch is large. In float16,
    # TensorFlow accumulates products in float16 on some CPUs, and that noise is as large as the bug.
    many = (64, 5, 7)
    for title, config in (_LAYERS[0], _LAYERS[4]):
        described = f"gradients, float32 logits of exact queries and keys: {title}"
        yield Case(
            next(ids),
            "dtype",
            described,
            config,
            many,
            logits=40.0,
            integers=True,
            of="vjp",
            dtypes=("bfloat16",),
        )
    title, config = _LAYERS[4]
    described = f"gradients, long sums: {title}"
    # In float16, correct kernel gradients are as far off if TensorFlow accumulates products in float16.
    yield Case(
        next(ids), "dtype", described, config, (128, 5, 7), of="vjp", dtypes=("bfloat16",), one_sign=True
    )
    title, config = _LAYERS[3]
    yield Case(next(ids), "dtype", f"R1: {title}", config, of="r1", dtypes=SIXTEEN_BITS)


CASES: tuple[Case, ...] = tuple(_rows())


def all_runs(cases: Iterable[Case] = CASES, *, level: Level = "deploy") -> list[Run]:
    """The cases up to a level, in each of their dtypes and layouts.

    Args:
        cases: the cases to choose from.
        level: the highest level.

    Example:
        >>> len(all_runs()) > len(all_runs(level="core")) > 100
        True
    """
    runs = [
        Run(case, dtype, layout)
        for case in cases
        if case.asked_at(level)
        for dtype in case.dtypes
        for layout in LAYOUTS
    ]
    return [run for run in runs if run.layout == LAYOUTS[0] or not run.in_any_layout]
