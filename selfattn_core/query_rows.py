"""Rows of the map and the change of the input, computed in blocks of query rows, with memory linear in the positions.

A row of the map needs all keys and one query, so any rows can be computed without the others. The definition,
`selfattn_core.spec`, computes the whole map (N, M), because its derivatives need it. Tests compare these functions with it.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.params import fold_spectral_norm

__all__ = ["attention_rows", "relative_change"]


_QUERIES, _KEYS = 1024, 4096
"""Sides of the block of weights that is held at once, 16 MiB in float32.

Narrower blocks are slow, because the threads of a BLAS synchronise once for some hundred keys, however few queries there
are.
"""


def attention_rows(
    config: SelfAttentionConfig, params: Mapping[str, Array], x: Array, positions: Sequence[tuple[int, int]]
) -> Array:
    """The rows of the map for some output positions.

    Args:
        config: options of the layer.
        params: parameters as for `spec.forward`, in the dtype of `x`.
        x: the features of one image (H, W, C), float32 or float64.
        positions: (h, w) of the output positions.

    Returns:
        (positions, H', W'), the rows of `spec.attention_map` in this order, on the grid of keys.

    Raises:
        ValueError: if the parameters do not fit the config, or a spectral norm is zero.

    Example:
        >>> from selfattn_core import init_params
        >>> config = SelfAttentionConfig(8, kv_pool=2)
        >>> attention_rows(config, init_params(config, seed=0), np.zeros((3, 6, 8), np.float32), [(2, 5)])
        array([[[0.33333334, 0.33333334, 0.33333334]]], dtype=float32)
    """
    config, params = fold_spectral_norm(config, params)
    keys = _pooled(config, _project(config, params, "key", x))
    asked = x[tuple(np.transpose(positions))]
    weights = _weights(_project(config, params, "query", asked), _flat(keys))
    return weights.reshape(len(positions), *keys.shape[:2])


def relative_change(
    config: SelfAttentionConfig,
    params: Mapping[str, Array],
    x: Array,
    *,
    positions: Array | None = None,
) -> float:
    """The root mean square of y − x relative to that of x, which is the layer's effect on these features.

    Args:
        config: options of the layer.
        params: parameters as for `spec.forward`, in the dtype of `x`.
        x: the features of one image (H, W, C), float32 or float64.
        positions: n = h·W + w of the output positions that are included. By default all.

    Raises:
        ValueError: if the parameters do not fit the config, or a spectral norm is zero.

    Example:
        >>> from selfattn_core import init_params
        >>> config = SelfAttentionConfig(8)
        >>> params = init_params(config, seed=0) | {"gamma": np.ones(1, np.float32)}
        >>> params["value.kernel"] = -np.eye(8, dtype=np.float32)
        >>> relative_change(config, params, np.ones((3, 5, 8), np.float32))  # z = −x
        1.0
    """
    config, params = fold_spectral_norm(config, params)
    keys = _flat(_pooled(config, _project(config, params, "key", x)))
    values = _flat(_pooled(config, _project(config, params, "value", x)))
    asked = _flat(x) if positions is None else _flat(x)[positions]
    changed = given = 0.0
    for start in range(0, len(asked), _QUERIES):
        rows = asked[start : start + _QUERIES]
        attended = _attended(_project(config, params, "query", rows), keys, values)
        z = _project(config, params, "out", attended) if config.out_projection else attended
        with np.errstate(over="ignore", invalid="ignore"):
            change = params["gamma"] * z + rows - rows
        changed += _squares(change)
        given += _squares(rows)
    return float(np.sqrt(changed) / max(np.sqrt(given), np.finfo(np.float32).tiny))


def _project(config: SelfAttentionConfig, params: Mapping[str, Array], name: str, rows: Array) -> Array:
    projected = _multiplied(rows, params[f"{name}.kernel"])
    if config.use_bias:
        projected += params[f"{name}.bias"]
    return projected


def _multiplied(rows: Array, columns: Array) -> Array:
    # An overflow is infinite or NaN, and shows in the result.
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(rows @ columns)


def _pooled(config: SelfAttentionConfig, maps: Array) -> Array:
    """(H, W, D) to (H', W', D): the largest value of each whole p×p window."""
    side = config.kv_pool
    down, across = config.key_grid(*maps.shape[:2])
    whole = maps[: down * side, : across * side]
    return np.asarray(whole.reshape(down, side, across, side, -1).max(axis=(1, 3)))


def _flat(maps: Array) -> Array:
    return maps.reshape(-1, maps.shape[-1])


def _weights(queries: Array, keys: Array) -> Array:
    """Softmax over the keys, (rows, M), computed in place of the logits."""
    weights = _multiplied(queries, keys.T)
    with np.errstate(invalid="ignore"):
        weights -= weights.max(axis=-1, keepdims=True)
        np.exp(weights, out=weights)
        weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def _attended(queries: Array, keys: Array, values: Array) -> Array:
    """The softmax over the keys times the values, (rows, Dv), computed one block of keys at a time.

    Exponentials are relative to the largest logit so far. A larger logit scales the earlier sums down.
    """
    largest = np.full((len(queries), 1), -np.inf, queries.dtype)
    total = np.zeros_like(largest)
    attended = np.zeros((len(queries), values.shape[1]), values.dtype)
    for start in range(0, len(keys), _KEYS):
        weights = _multiplied(queries, keys[start : start + _KEYS].T)
        with np.errstate(invalid="ignore"):
            larger = np.maximum(largest, weights.max(axis=-1, keepdims=True))
            weights -= larger
            np.exp(weights, out=weights)
            shrink = np.exp(largest - larger)
            total = total * shrink + weights.sum(axis=-1, keepdims=True)
            attended = attended * shrink + _multiplied(weights, values[start : start + _KEYS])
        # Otherwise it would be kept while the next block is computed.
        del weights
        largest = larger
    with np.errstate(invalid="ignore"):
        return np.asarray(attended / total)


def _squares(rows: Array) -> float:
    return float(np.square(rows, dtype=np.float64).sum())
