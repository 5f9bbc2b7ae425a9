"""The parameters a config has: names, shapes and initial values, in one table that everything reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from selfattn_core.config import SelfAttentionConfig

__all__ = [
    "Parameter",
    "check_params",
    "glorot_limit",
    "init_params",
    "is_floating",
    "parameter_table",
    "projections",
    "widen",
]


@dataclass(frozen=True)
class Parameter:
    """One row of the table.

    Args:
        name: canonical name, for example "query.kernel".
        shape: (C_in, C_out) of a kernel, (C_out,) of a bias, (1,) of gamma.
        initial: the distribution a new layer draws it from.
    """

    name: str
    shape: tuple[int, ...]
    initial: Literal["glorot_uniform", "zeros"]


def projections(config: SelfAttentionConfig) -> dict[str, tuple[int, int]]:
    """The 1×1 projections of a layer and their (C_in, C_out).

    Example:
        >>> projections(SelfAttentionConfig.pooled(64))
        {'query': (64, 8), 'key': (64, 8), 'value': (64, 32), 'out': (32, 64)}
    """
    widths = {
        "query": (config.channels, config.qk_channels),
        "key": (config.channels, config.qk_channels),
        "value": (config.channels, config.value_channels),
    }
    if config.out_projection:
        widths["out"] = (config.value_channels, config.channels)
    return widths


def parameter_table(config: SelfAttentionConfig) -> dict[str, Parameter]:
    """Every parameter of a layer by canonical name, in the order of the file format.

    Example:
        >>> [f"{p.name} {p.shape}" for p in parameter_table(SelfAttentionConfig(16)).values()][:2]
        ['query.kernel (16, 2)', 'query.bias (2,)']
    """
    rows = []
    for name, (channels_in, channels_out) in projections(config).items():
        rows.append(Parameter(f"{name}.kernel", (channels_in, channels_out), "glorot_uniform"))
        if config.use_bias:
            rows.append(Parameter(f"{name}.bias", (channels_out,), "zeros"))
    rows.append(Parameter("gamma", (1,), "zeros"))
    return {row.name: row for row in rows}


def glorot_limit(channels_in: int, channels_out: int) -> float:
    """Half the width of the Glorot-uniform interval: kernels are drawn from U(-limit, limit).

    Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks",
    2010, equation 16, for a 1×1 convolution.

    Example:
        >>> glorot_limit(5, 1)
        1.0
    """
    return float(np.sqrt(6.0 / (channels_in + channels_out)))


def init_params(
    config: SelfAttentionConfig, seed: int, dtype: DTypeLike = np.float32
) -> dict[str, NDArray[Any]]:
    """New parameters: Glorot-uniform kernels, zero biases, zero gamma.

    Args:
        config: the layer.
        seed: of numpy's PCG64; equal seeds give equal values.
        dtype: of the arrays.

    Returns:
        A new array for every name of `parameter_table(config)`.

    Example:
        >>> init_params(SelfAttentionConfig(16), seed=0)["gamma"]
        array([0.], dtype=float32)
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    params = {}
    for row in parameter_table(config).values():
        if row.initial == "zeros":
            params[row.name] = np.zeros(row.shape, dtype)
        else:
            limit = glorot_limit(*row.shape)
            params[row.name] = generator.uniform(-limit, limit, row.shape).astype(dtype)
    return params


def is_floating(dtype: DTypeLike) -> bool:
    """Whether a numpy dtype is one that weights can have; bfloat16 is ml_dtypes', whose kind is not 'f'."""
    resolved = np.dtype(dtype)
    return resolved.kind == "f" or resolved.name == "bfloat16"


def widen(array: NDArray[Any]) -> NDArray[Any]:
    """A bfloat16 array as float32, which is exact; any other array as it is.

    Example:
        >>> widen(np.ones(2, np.float16)).dtype
        dtype('float16')
    """
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def check_params(
    config: SelfAttentionConfig, params: Mapping[str, Any], *, finite: bool = True
) -> dict[str, NDArray[Any]]:
    """The parameters as arrays, once names, shapes, dtypes and values have been found right.

    Args:
        config: the layer they should fit.
        params: arrays by canonical name; gamma may have any shape of one element.
        finite: whether NaN and infinity are problems.

    Returns:
        A new dict in the order of the table, with gamma as (1,); the arrays are not copied.

    Raises:
        ValueError: naming every missing, extra, misshapen, non-floating and non-finite tensor at once.

    Example:
        >>> check_params(SelfAttentionConfig(16), {"gamma": np.zeros(1)})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: parameters do not fit SelfAttentionConfig(channels=16, ...):
          missing: query.kernel (16, 2)
          missing: query.bias (2,)
        ...
    """
    table = parameter_table(config)
    problems = [f"missing: {row.name} {row.shape}" for row in table.values() if row.name not in params]
    problems += [f"unexpected: {name} {np.shape(params[name])}" for name in params if name not in table]
    arrays = {}
    for name, row in table.items():
        if name not in params:
            continue
        array = np.asarray(params[name])
        if name == "gamma" and array.size == 1:
            array = array.reshape(1)
        if array.shape != row.shape:
            problems.append(f"wrong shape: {name} is {array.shape}, should be {row.shape}")
        if not is_floating(array.dtype):
            problems.append(f"wrong dtype: {name} is {array.dtype}, should be floating point")
        elif finite and not np.isfinite(array).all():
            problems.append(f"not finite: {name} holds NaN or infinity")
        arrays[name] = array
    dtypes = sorted({str(array.dtype) for array in arrays.values() if is_floating(array.dtype)})
    if len(dtypes) > 1:
        problems.append(f"mixed dtypes: {', '.join(dtypes)}; all tensors of a layer should have one")
    if problems:
        raise ValueError(f"parameters do not fit {config}:\n  " + "\n  ".join(problems))
    return arrays
