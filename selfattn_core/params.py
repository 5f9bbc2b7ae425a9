"""Tables of the parameters and the state of a config: names, shapes and initial values."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from selfattn_core import spectral_norm
from selfattn_core.arrays import is_floating, widen
from selfattn_core.config import SelfAttentionConfig

__all__ = [
    "KV_POOL",
    "Parameter",
    "check_params",
    "fold_spectral_norm",
    "glorot_limit",
    "init_params",
    "is_floating",
    "param_problems",
    "parameter_table",
    "projections",
    "refresh_spectral_norm",
    "state_table",
    "widen",
]

# The name of the pooling in a framework's own file. No parameter shows the pooling, so it is stored beside the weights.
KV_POOL = "selfattn kv_pool"


@dataclass(frozen=True)
class Parameter:
    """One row of a table.

    Args:
        name: canonical name, for example "query.kernel".
        shape: (C_in, C_out) of a kernel, (C_out,) of a bias or a vector u, (C_in,) of a vector v, (1,) of gamma.
        initial: rule for the initial value. "power_iteration" is the rule of `init_params` for the state.
    """

    name: str
    shape: tuple[int, ...]
    initial: Literal["glorot_uniform", "zeros", "power_iteration"]


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
    """Every trained parameter of a layer, by canonical name in the order of the file format.

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


def state_table(config: SelfAttentionConfig) -> dict[str, Parameter]:
    """The state that a layer keeps from step to step: u and v of each projection with spectral norm.

    In a dict of arrays and in a file the state follows the parameters.

    Example:
        >>> list(state_table(SelfAttentionConfig(16)))
        []
        >>> [f"{p.name} {p.shape}" for p in state_table(SelfAttentionConfig(16, spectral_norm=True)).values()][:2]
        ['query.u (2,)', 'query.v (16,)']
    """
    rows = []
    for name, (channels_in, channels_out) in projections(config).items() if config.spectral_norm else ():
        rows.append(Parameter(f"{name}.u", (channels_out,), "power_iteration"))
        rows.append(Parameter(f"{name}.v", (channels_in,), "power_iteration"))
    return {row.name: row for row in rows}


def glorot_limit(channels_in: int, channels_out: int) -> float:
    """Half the width of the Glorot-uniform interval. Kernels are drawn from U(-limit, limit).

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
    """New parameters and state: Glorot-uniform kernels, zero biases, zero gamma.

    With spectral norm, u and v of each projection come from 15 power iterations on the initial kernel
    (`selfattn_core.spectral_norm.warmed_up`), which start at a v of independent standard normal numbers. Kernels are
    drawn first, so they are the same with and without spectral norm.

    Args:
        config: options of the layer.
        seed: seed of numpy's PCG64. Equal seeds give equal values.
        dtype: dtype of the arrays.

    Returns:
        A new array for every name of `parameter_table(config)`, then of `state_table(config)`.

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
    for name, (channels_in, _) in projections(config).items() if config.spectral_norm else ():
        kernel = params[f"{name}.kernel"].astype(np.float64)
        u, v = spectral_norm.warmed_up(kernel, generator.standard_normal(channels_in))
        params |= {f"{name}.u": u.astype(dtype), f"{name}.v": v.astype(dtype)}
    return params


def fold_spectral_norm(
    config: SelfAttentionConfig, params: Mapping[str, Any]
) -> tuple[SelfAttentionConfig, dict[str, NDArray[Any]]]:
    """The same function without spectral norm. Every kernel is divided by the norm that its u and v estimate.

    The output is that of evaluation mode, except for the rounding of the kernels. A kernel of zeros stays zero. Training
    cannot continue as before, because the raw kernels and the state are lost.

    Args:
        config: options of the layer. A config without spectral norm is returned unchanged.
        params: arrays by canonical name, with u and v. These are used as they are, whatever their length.

    Returns:
        The config with `spectral_norm=False`, and its parameters. The division is in float64, the result in the dtype of
        the arrays.

    Raises:
        ValueError: if the arrays do not fit the config, or if the norm of a kernel that is not zero is zero or not finite.
            Then its u and v are useless, and `refresh_spectral_norm` makes new ones. The message lists every problem.

    Example:
        >>> config = SelfAttentionConfig(16, spectral_norm=True)
        >>> folded, params = fold_spectral_norm(config, init_params(config, seed=0))
        >>> folded.spectral_norm, round(float(np.linalg.norm(params["value.kernel"], 2)), 1)
        (False, 1.0)
    """
    arrays = check_params(config, params)
    if not config.spectral_norm:
        return config, arrays
    problems = []
    for name in projections(config):
        kernel, u, v = (arrays[f"{name}.{part}"].astype(np.float64) for part in ("kernel", "u", "v"))
        norm = spectral_norm.sigma(kernel, u, v)
        if not kernel.any():
            continue
        if norm == 0:
            problems.append(f"{name}: its norm vᵀ K u is 0")
            continue
        with np.errstate(over="ignore"):
            folded = (kernel / norm).astype(arrays[f"{name}.kernel"].dtype)
        if not np.isfinite(folded).all():
            problems.append(f"{name}: its norm vᵀ K u = {norm:.3g} is too small to divide by")
        arrays[f"{name}.kernel"] = folded
    if problems:
        raise ValueError(
            f"spectral norm cannot be folded: {'; '.join(problems)}; expected vectors u, v of these kernels that are not "
            "zero. Perhaps they were never initialised or loaded. "
            "selfattn_core.params.refresh_spectral_norm(config, params) makes them from the kernels."
        )
    plain = replace(config, spectral_norm=False)
    return plain, {name: arrays[name] for name in parameter_table(plain)}


def refresh_spectral_norm(config: SelfAttentionConfig, params: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The same kernels with a new state, the limit of power iterations on them.

    Use it for kernels that were set outside training: reinitialised, copied, averaged, or loaded without u and v. The old
    state belongs to other kernels, and the first outputs in evaluation mode could be wrong by any factor.
    `selfattn_core.spectral_norm.share` computes this factor.

    Args:
        config: options of the layer. Without spectral norm there is no state.
        params: arrays by canonical name. u and v are not read and may be missing.

    Returns:
        The arrays with new u and v, in the dtype of the kernels.

    Raises:
        ValueError: if the arrays do not fit the config. The message lists every problem.

    Example:
        >>> config = SelfAttentionConfig(16, spectral_norm=True)
        >>> params = init_params(config, seed=0)
        >>> params["value.kernel"] = init_params(config, seed=1)["value.kernel"]
        >>> fresh = refresh_spectral_norm(config, params)
        >>> [round(spectral_norm.share(*(p[f"value.{part}"] for part in ("kernel", "u", "v"))), 1) for p in (params, fresh)]
        [-0.1, 1.0]
    """
    state = state_table(config)
    parameters = check_params(
        replace(config, spectral_norm=False), {name: params[name] for name in params if name not in state}
    )
    vectors: dict[str, NDArray[Any]] = {}
    for name in projections(config) if config.spectral_norm else ():
        kernel = parameters[f"{name}.kernel"]
        u, v = spectral_norm.converged(kernel)
        vectors |= {f"{name}.u": u.astype(kernel.dtype), f"{name}.v": v.astype(kernel.dtype)}
    return parameters | vectors


def check_params(
    config: SelfAttentionConfig, params: Mapping[str, Any], *, finite: bool = True
) -> dict[str, NDArray[Any]]:
    """Check names, shapes, dtypes and values of the parameters, and return them as arrays.

    Args:
        config: options of the layer that the parameters should fit.
        params: arrays by canonical name. gamma may have any shape of one element.
        finite: whether NaN and infinity are problems.

    Returns:
        A new dict in the order of `parameter_table`, then `state_table`, with gamma as (1,). The arrays are copied only
        if their byte order is not that of the machine.

    Raises:
        ValueError: if the parameters do not fit. The message names every missing, extra, misshapen, non-floating and
            non-finite tensor.

    Example:
        >>> check_params(SelfAttentionConfig(16), {"gamma": np.zeros(1)})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: parameters do not fit SelfAttentionConfig(channels=16, ...):
          missing: query.kernel (16, 2)
          missing: query.bias (2,)
        ...
    """
    arrays, problems = _examined(config, params, finite=finite)
    if problems:
        raise ValueError(f"parameters do not fit {config}:\n  " + "\n  ".join(problems))
    return arrays


def param_problems(
    config: SelfAttentionConfig, params: Mapping[str, Any], *, finite: bool = True
) -> list[str]:
    """What `check_params` refuses, one problem an item; empty if the parameters fit.

    Example:
        >>> param_problems(SelfAttentionConfig(16), {"gamma": np.zeros(1)})[0]
        'missing: query.kernel (16, 2)'
    """
    return _examined(config, params, finite=finite)[1]


def _examined(
    config: SelfAttentionConfig, params: Mapping[str, Any], *, finite: bool
) -> tuple[dict[str, NDArray[Any]], list[str]]:
    table = parameter_table(config) | state_table(config)
    problems = [f"missing: {row.name} {row.shape}" for row in table.values() if row.name not in params]
    problems += [f"unexpected: {name} {np.shape(params[name])}" for name in params if name not in table]
    arrays = {}
    for name, row in table.items():
        if name not in params:
            continue
        array = np.asarray(params[name])
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
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
    return arrays, problems
