"""Judging whether the weights of new layers follow the distributions of the table of parameters."""

from collections.abc import Mapping
from itertools import combinations

import numpy as np

from selfattn_core import spectral_norm
from selfattn_core.arrays import Array
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.conformance.questions.ask import INITIAL_DRAWS
from selfattn_core.conformance.verdicts.tolerance import Verdict
from selfattn_core.params import Parameter, glorot_limit, parameter_table, projections

__all__ = ["distribution_verdicts"]


# The largest sqrt(n) times the Kolmogorov-Smirnov statistic, and the largest correlation in standard errors. A correct
# backend exceeds each once in 10⁹ draws.
_LARGEST_DEPARTURE = 3.3
_LARGEST_CORRELATION = 6.0

_LEAST_SHARE = 0.7
"""The least share of the norm that 15 power iterations find from a random start."""


def distribution_verdicts(config: SelfAttentionConfig, found: Mapping[str, Array]) -> list[Verdict]:
    """One verdict for each parameter, and one for the independence of the draws.

    Args:
        config: the configuration of the layers.
        found: an array for each "<draw>: <canonical name>". The last draw has the seed of the first.
    """
    verdicts = [
        _verdict(row.name, _strange(row, found) or _problem(row, _draws(row, found)))
        for row in parameter_table(config).values()
    ]
    rows = parameter_table(config)
    drawn = [name for name, row in rows.items() if row.initial != "zeros" and not _strange(row, found)]
    problems = [
        f"{one} and {other} of one layer are correlated"
        for one, other in combinations(drawn, 2)
        if np.prod(rows[one].shape) == np.prod(rows[other].shape)
        and _alike(found[f"0: {one}"], found[f"0: {other}"])
    ]
    problems += [
        f"{name} of two seeds is correlated"
        for name in drawn
        if _alike(found[f"0: {name}"], found[f"1: {name}"])
    ]
    problems += [
        f"{name} differs between two layers of one seed"
        for name in drawn
        if not np.array_equal(found[f"0: {name}"], found[f"{INITIAL_DRAWS - 1}: {name}"])
    ]
    verdicts += [
        _verdict(f"{name}.norm", _state_problem(found, name))
        for name in (projections(config) if config.spectral_norm else ())
    ]
    if drawn:
        verdicts.append(_verdict("independence", "; ".join(problems)))
    return verdicts


def _state_problem(found: Mapping[str, Array], name: str) -> str:
    for draw in range(INITIAL_DRAWS):
        kernel, u, v = (found[f"{draw}: {name}.{part}"].astype(np.float64) for part in ("kernel", "u", "v"))
        if (v.shape + u.shape) != kernel.shape:
            return f"got u {u.shape} and v {v.shape} for a kernel {kernel.shape}"
        lengths = float(np.linalg.norm(u)), float(np.linalg.norm(v))
        if not all(abs(length - 1) < 1e-5 for length in lengths):
            return f"u and v have lengths {lengths[0]:.6g} and {lengths[1]:.6g}, expected 1"
        share = spectral_norm.sigma(kernel, u, v) / np.linalg.norm(kernel, 2)
        if not _LEAST_SHARE < share < 1 + 1e-5:
            return f"σ is {share:.3g} × the norm of the kernel, expected {_LEAST_SHARE:g} at least"
    return ""


def _draws(row: Parameter, found: Mapping[str, Array]) -> list[Array]:
    return [found[f"{draw}: {row.name}"] for draw in range(INITIAL_DRAWS)]


def _strange(row: Parameter, found: Mapping[str, Array]) -> str:
    draws = _draws(row, found)
    strange = [
        f"{draw.dtype} {draw.shape}" for draw in draws if draw.shape != row.shape or draw.dtype != np.float32
    ]
    if strange:
        return f"got {', '.join(dict.fromkeys(strange))}, expected float32 {row.shape}"
    return ""


def _problem(row: Parameter, draws: list[Array]) -> str:
    if row.initial == "zeros":
        return "is not zero" if any(draw.any() for draw in draws) else ""
    limit = glorot_limit(*row.shape)
    if any(np.unique(draw, axis=axis).shape != draw.shape for draw in draws for axis in (0, 1)):
        return "repeats a row or a column"
    # The last draw repeats the first.
    values = np.sort(np.concatenate([draw.ravel() for draw in draws[:-1]]).astype(np.float64))
    if not np.isfinite(values).all():
        return "is not finite"
    # Allow rounding at the ends of Glorot's interval.
    beyond = float(np.abs(values).max()) / limit
    if beyond > 1 + 2.0**-20:
        return f"reaches {beyond:.3g} × the limit ±{limit:.3g} of Glorot's interval"
    uniform = (values / limit + 1) / 2
    steps = np.arange(values.size + 1) / values.size
    departure = max((steps[1:] - uniform).max(), (uniform - steps[:-1]).max()) * np.sqrt(values.size)
    if departure > _LARGEST_DEPARTURE:
        return (
            f"is not uniform on ±{limit:.3g}: the Kolmogorov-Smirnov statistic of {values.size} values is "
            f"{departure:.3g} / √n, expected at most {_LARGEST_DEPARTURE:g} / √n, which chance exceeds once in 10⁹"
        )
    return ""


def _alike(first: Array, second: Array) -> bool:
    one, two = (array.ravel().astype(np.float64) for array in (first, second))
    scale = np.sqrt((one**2).sum() * (two**2).sum())
    return bool(abs((one * two).sum()) > _LARGEST_CORRELATION / np.sqrt(one.size) * scale)


def _verdict(name: str, problem: str) -> Verdict:
    wrong = 0.0 if not problem else np.inf
    return Verdict(name, wrong, wrong, not problem, f"{name}: {problem}" if problem else "")
