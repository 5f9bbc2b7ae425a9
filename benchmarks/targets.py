"""The targets, and the comparison of measurements with them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cells import CEILINGS, DIFFUSE, FRAMEWORKS, IN_FLOAT32, OURS, Cell
from benchmarks.results import cells, exponent, frameworks, median, peak

__all__ = ["TARGETS", "Finding", "Target", "evaluate"]

Results = Mapping[str, Any]
Several = list[tuple[float, str]]
Measured = Callable[[Results, str], float | Several | None]
Chosen = Callable[[Mapping[str, Any]], bool]


@dataclass(frozen=True)
class Target:
    """One number to reach.

    Args:
        row: description of the comparison.
        framework: the framework.
        measured: maps results and framework to the number, or to None if a measurement is missing. Or to several numbers,
            each with the words for its cell, of which the worst counts.
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
        words: where the worst of several measurements was, and how many of them miss the target. Empty without several.
    """

    target: Target
    value: float | None
    share: float | None = None
    words: str = ""

    @property
    def verdict(self) -> str:
        """The verdict: "met", "missed" or "not measured"."""
        if self.value is None:
            return "not measured"
        return "met" if _meets(self.target, self.value) else "missed"

    def __str__(self) -> str:
        target = self.target
        bound = f"{'≥' if target.at_least else '≤'} {target.bound:g}"
        return f"({bound})" if self.value is None else f"{self.value:.3g}{target.unit} ({bound})"


def evaluate(results: Results) -> list[Finding]:
    """Every target of the frameworks in the results. Without targets on devices other than the CPU."""
    if "device" in results["machine"]:
        return []
    known = frameworks(results)
    return [_finding(target, results) for target in TARGETS if target.framework in known]


def _finding(target: Target, results: Results) -> Finding:
    measured = target.measured(results, target.framework)
    if not isinstance(measured, list):
        share = target.share(results, target.framework) if target.share else None
        return Finding(target, measured, share if not isinstance(share, list) else None)
    if not measured:
        return Finding(target, None)
    value, words = sorted(measured, reverse=not target.at_least)[0]
    misses = sum(not _meets(target, each) for each, _ in measured)
    return Finding(
        target, value, words=f"in {words}" + (f" ({misses} of {len(measured)} miss it)" if misses else "")
    )


def _meets(target: Target, value: float) -> bool:
    return value >= target.bound if target.at_least else value <= target.bound


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def _core(step: str, channels: int, side: int, measure: str = "time") -> Cell:
    return Cell(measure, "core", step, channels, side)  # type: ignore[arg-type]


def _faster_than(name: str, step: str, channels: int, side: int) -> Measured:
    """The time of the other divided by ours."""
    cell = _core(step, channels, side)
    return lambda results, framework: _ratio(
        median(results, framework, cell, name), median(results, framework, cell)
    )


def _time_of(name: str, step: str, channels: int, side: int) -> Measured:
    """Our time divided by that of the other."""
    cell = _core(step, channels, side)
    return lambda results, framework: _ratio(
        median(results, framework, cell), median(results, framework, cell, name)
    )


def _memory_of_dense(results: Results, framework: str) -> float | None:
    """The dense peak divided by ours."""
    cell = _core("train", 64, 128, "memory")
    return _ratio(peak(results, framework, cell, "dense"), peak(results, framework, cell))


def _growth(step: str) -> Measured:
    def measured(results: Results, framework: str) -> float | None:
        sides = (64, 128, 256)
        found = {side: peak(results, framework, _core(step, 64, side, "memory")) for side in sides}
        points = [(side**2, bytes_) for side, bytes_ in found.items() if bytes_]
        return exponent(points) if len(points) == len(found) else None

    return measured


def _share_of_matmul(step: str, channels: int, side: int) -> Measured:
    """Our rate as a share of the faster ceiling's rate. Both have the same number of operations."""
    cell = _core(step, channels, side)

    def measured(results: Results, framework: str) -> float | None:
        ceilings = [median(results, framework, cell, name) for name in CEILINGS]
        known = [seconds for seconds in ceilings if seconds is not None]
        return _ratio(min(known, default=None), median(results, framework, cell))

    return measured


def _gigabytes(results: Results, framework: str) -> float | None:
    return _ratio(peak(results, framework, _core("train", 64, 256, "memory")), 1e9)


def _of_the_fastest(results: Results, framework: str) -> float | None:
    cell = _core("train", 64, 128)
    times = [median(results, each, cell) for each in frameworks(results)]
    known = [time for time in times if time is not None]
    mine = median(results, framework, cell)
    return _ratio(mine, min(known)) if len(known) > 1 else None


def _each(one: str, other: str, chosen: Chosen) -> Measured:
    """The time of one implementation divided by that of another, in every chosen cell."""

    def measured(results: Results, framework: str) -> Several:
        found = []
        for cell in cells(results, framework, measure="time"):
            times = [cell["results"].get(name, {}).get("seconds", {}).get("median") for name in (one, other)]
            if chosen(cell) and (ratio := _ratio(*times)) is not None:
                found.append((ratio, _words(cell)))
        return found

    return measured


def _of_before(measure: str, chosen: Chosen) -> Measured:
    """This build's time or memory divided by that of the other build, in every chosen cell."""

    def measured(results: Results, framework: str) -> Several:
        return [
            (cell["results"]["now"]["of_before"], _words(cell))
            for cell in cells(results, framework, against=True, measure=measure)
            if chosen(cell) and "of_before" in cell["results"]["now"]
        ]

    return measured


def _words(cell: Mapping[str, Any]) -> str:
    return str(Cell(**{key: value for key, value in cell.items() if key != "results"}))


def _any(_: Mapping[str, Any]) -> bool:
    return True


def _diffuse(cell: Mapping[str, Any]) -> bool:
    return cell["dtype"] == "float32" and cell["logits"] is None


def _small_layer(cell: Mapping[str, Any]) -> bool:
    return _diffuse(cell) and cell["level"] != "core" and cell["side"] <= 32


def _trained(cell: Mapping[str, Any], *channels: int) -> bool:
    """Forward and backward of the core in bfloat16 at 64×64, with one of these widths."""
    wanted = {"dtype": "bfloat16", "level": "core", "step": "train", "side": 64}
    return all(cell[key] == value for key, value in wanted.items()) and cell["channels"] in channels


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
    return [
        Target(row, framework, measured, bound, at_least, unit, share)
        for framework, bound in zip(FRAMEWORKS, bounds, strict=True)
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
        "core, 8² to 32²: time of dense",
        _each(OURS, "dense", lambda cell: _diffuse(cell) and cell["level"] == "core" and cell["side"] <= 32),
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
    *_rows(
        "layers, 8² to 32², B = 1 and 16: time of dense",
        _each(OURS, "dense", _small_layer),
        (1.03, 1.03, 1.03),
        at_least=False,
    ),
    Target(
        "float32, forward, and forward and backward: time of dense",
        "tensorflow",
        _each(OURS, "dense", lambda cell: _diffuse(cell) and cell["step"] != "r1"),
        1.0,
        at_least=False,
    ),
    *_rows(
        "peaked maps: time of a diffuse map",
        _each(OURS, DIFFUSE, lambda cell: cell["logits"] is not None),
        (1.15, 1.15, 1.15),
        at_least=False,
    ),
    *_rows(
        "bfloat16, forward and backward, C = 256 and 512 at 64×64: time of float32",
        _each(OURS, IN_FLOAT32, lambda cell: _trained(cell, 256, 512)),
        (0.45, 0.45, 0.45),
        at_least=False,
    ),
    *_rows(
        "bfloat16, forward and backward, C = 256 and 512 at 64×64: time of the other build",
        _of_before("time", lambda cell: _trained(cell, 256, 512)),
        (0.45, 0.45, 0.45),
        at_least=False,
    ),
    *_rows(
        "bfloat16, R1 step at 64×64: time of the other build",
        _of_before(
            "time", lambda cell: cell["dtype"] == "bfloat16" and cell["step"] == "r1" and cell["side"] == 64
        ),
        (0.6, 0.6, 0.6),
        at_least=False,
    ),
    *_rows(
        "bfloat16, forward and backward: time of dense in bfloat16",
        _each(OURS, "dense", lambda cell: cell["dtype"] == "bfloat16" and cell["step"] == "train"),
        (1.0, 1.0, 1.0),
        at_least=False,
    ),
    *_rows(
        "bfloat16, forward and backward, C = 64 and 256 at 64×64: faster than dense in bfloat16",
        _each("dense", OURS, lambda cell: _trained(cell, 64, 256)),
        (1.3, 1.3, 1.3),
        at_least=True,
    ),
    *_rows(
        "float32, diffuse maps: time of the other build",
        _of_before("time", _diffuse),
        (1.02, 1.02, 1.02),
        at_least=False,
    ),
    *_rows(
        "peak memory: of the other build",
        _of_before("memory", _any),
        (1.0, 1.0, 1.0),
        at_least=False,
    ),
)
