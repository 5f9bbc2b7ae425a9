"""The targets, and the comparison of measurements with them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cells import CEILINGS, OURS
from benchmarks.results import exponent, median, peak, records

__all__ = ["TARGETS", "Finding", "Target", "evaluate"]

Results = Mapping[str, Any]
Measured = Callable[[Results, str], float | None]


@dataclass(frozen=True)
class Target:
    """One number to reach.

    Args:
        row: description of the comparison.
        framework: the framework.
        measured: maps results and framework to the number, or to None if a measurement is missing.
        bound: the number to reach.
        at_least: whether more is better.
        unit: unit after the number.
        share: for a speed, our share of the matmul rate in the same measurement. It shows whether more is possible.
    """

    row: str
    framework: str
    measured: Measured
    bound: float
    at_least: bool
    unit: str = " ×"
    share: Measured | None = None


@dataclass(frozen=True)
class Finding:
    """A target and its measurement.

    Args:
        target: the target.
        value: the measurement, or None without one.
        share: our share of the matmul rate there, or None if it has no meaning or was not measured.
    """

    target: Target
    value: float | None
    share: float | None = None

    @property
    def verdict(self) -> str:
        """The verdict: "met", "missed" or "not measured"."""
        if self.value is None:
            return "not measured"
        target = self.target
        met = self.value >= target.bound if target.at_least else self.value <= target.bound
        return "met" if met else "missed"

    def __str__(self) -> str:
        target = self.target
        bound = f"{'≥' if target.at_least else '≤'} {target.bound:g}"
        return f"({bound})" if self.value is None else f"{self.value:.3g}{target.unit} ({bound})"


def evaluate(results: Results) -> list[Finding]:
    """Every target of the frameworks in the results. Without targets on devices other than the CPU."""
    if "device" in results["machine"]:
        return []
    return [
        Finding(
            target,
            target.measured(results, target.framework),
            target.share(results, target.framework) if target.share else None,
        )
        for target in TARGETS
        if target.framework in results["frameworks"]
    ]


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def _faster_than(name: str, step: str, channels: int, side: int) -> Measured:
    def measured(results: Results, framework: str) -> float | None:
        times = [median(results, framework, step, channels, side, which) for which in (name, OURS)]
        return _ratio(*times)

    return measured


def _time_of(name: str, step: str, channels: int, side: int) -> Measured:
    """Our time divided by that of the other."""

    def measured(results: Results, framework: str) -> float | None:
        times = [median(results, framework, step, channels, side, which) for which in (OURS, name)]
        return _ratio(*times)

    return measured


def _memory_of_dense(results: Results, framework: str) -> float | None:
    """The dense peak divided by ours."""
    return _ratio(
        peak(results, framework, "train", 64, 128, "dense"), peak(results, framework, "train", 64, 128)
    )


def _growth(step: str) -> Measured:
    def measured(results: Results, framework: str) -> float | None:
        found = {side: peak(results, framework, step, 64, side) for side in (64, 128, 256)}
        points = [(side**2, bytes_) for side, bytes_ in found.items() if bytes_]
        return exponent(points) if len(points) == len(found) else None

    return measured


def _share_of_matmul(step: str, channels: int, side: int) -> Measured:
    """Our rate as a share of the faster ceiling's rate. Both have the same number of operations."""

    def measured(results: Results, framework: str) -> float | None:
        ceilings = [median(results, framework, step, channels, side, name) for name in CEILINGS]
        known = [seconds for seconds in ceilings if seconds is not None]
        return _ratio(min(known, default=None), median(results, framework, step, channels, side))

    return measured


def _slowest_small(results: Results, framework: str) -> float | None:
    """The largest ratio of our median to the dense one over all cells of the core from 8² to 32²."""
    ratios = []
    for step in ("forward", "train", "r1"):
        for channels in (64, 256, 512):
            for side in records(results, framework, "time", "core", step, channels):
                ratio = _time_of("dense", step, channels, side)(results, framework)
                if side <= 32 and ratio is not None:
                    ratios.append(ratio)
    return max(ratios, default=None)


def _gigabytes(results: Results, framework: str) -> float | None:
    return _ratio(peak(results, framework, "train", 64, 256), 1e9)


def _of_the_fastest(results: Results, framework: str) -> float | None:
    times = [median(results, each, "train", 64, 128) for each in results["frameworks"]]
    known = [time for time in times if time is not None]
    mine = median(results, framework, "train", 64, 128)
    return _ratio(mine, min(known)) if len(known) > 1 else None


def _rows(
    row: str,
    measured: Measured,
    bounds: Sequence[float],
    *,
    at_least: bool,
    unit: str = " ×",
    share: Measured | None = None,
) -> list[Target]:
    """One row of the table, with a bound for each of torch, JAX and TensorFlow."""
    frameworks = ("torch", "jax", "tensorflow")
    return [
        Target(row, framework, measured, bound, at_least, unit, share)
        for framework, bound in zip(frameworks, bounds, strict=True)
    ]


TARGETS: tuple[Target, ...] = (
    *_rows(
        "forward, C = 64 at 64×64: faster than dense",
        _faster_than("dense", "forward", 64, 64),
        (3.5, 1.6, 1.0),
        at_least=True,
        share=_share_of_matmul("forward", 64, 64),
    ),
    *_rows(
        "forward, C = 256 at 64×64: faster than dense",
        _faster_than("dense", "forward", 256, 64),
        (1.8, 1.3, 1.0),
        at_least=True,
        share=_share_of_matmul("forward", 256, 64),
    ),
    *_rows(
        "forward, C = 512 at 64×64: faster than dense",
        _faster_than("dense", "forward", 512, 64),
        (1.25, 1.05, 1.0),
        at_least=True,
        share=_share_of_matmul("forward", 512, 64),
    ),
    *_rows(
        "forward and backward, C = 64 at 128×128: faster than dense",
        _faster_than("dense", "train", 64, 128),
        (4.5, 1.5, 1.0),
        at_least=True,
        share=_share_of_matmul("train", 64, 128),
    ),
    Target(
        "forward and backward, C = 64 at 128×128: faster than SDPA",
        "torch",
        _faster_than("sdpa", "train", 64, 128),
        3.5,
        at_least=True,
        share=_share_of_matmul("train", 64, 128),
    ),
    *_rows(
        "forward and backward, C = 512 at 64×64: faster than dense",
        _faster_than("dense", "train", 512, 64),
        (1.4, 1.05, 1.0),
        at_least=True,
        share=_share_of_matmul("train", 512, 64),
    ),
    Target(
        "forward and backward, C = 512 at 64×64: faster than SDPA",
        "torch",
        _faster_than("sdpa", "train", 512, 64),
        1.4,
        at_least=True,
        share=_share_of_matmul("train", 512, 64),
    ),
    *_rows(
        "R1 step, C = 64 at 64×64: time of dense",
        _time_of("dense", "r1", 64, 64),
        (1.0, 1.2, 1.2),
        at_least=False,
    ),
    *_rows(
        "peak memory, forward and backward, C = 64 at 128×128: less than dense",
        _memory_of_dense,
        (15, 15, 8),
        at_least=True,
    ),
    *_rows(
        "exponent of N in peak memory, 64² to 256², forward and backward",
        _growth("train"),
        (1.15, 1.15, 1.2),
        at_least=False,
        unit="",
    ),
    *_rows(
        "exponent of N in peak memory, 64² to 256², R1 step",
        _growth("r1"),
        (1.15, 1.15, 1.2),
        at_least=False,
        unit="",
    ),
    *_rows(
        "forward, C = 512 at 64×64: share of the matmul rate",
        _share_of_matmul("forward", 512, 64),
        (0.9, 0.85, 0.9),
        at_least=True,
        unit="",
    ),
    *_rows(
        "8² to 32²: time of dense, in the worst cell",
        _slowest_small,
        (1.05, 1.05, 1.1),
        at_least=False,
    ),
    *_rows(
        "peak memory, forward and backward, C = 64 at 256×256",
        _gigabytes,
        (2, 2, 2),
        at_least=False,
        unit=" GB",
    ),
    *_rows(
        "forward and backward, C = 64 at 128×128: time of the fastest framework",
        _of_the_fastest,
        (1.5, 1.5, 1.5),
        at_least=False,
    ),
)
