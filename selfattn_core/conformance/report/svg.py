"""Line charts as SVG in the colours of the surrounding page."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Chart", "Line", "as_svg"]

_WIDTH, _HEIGHT = 440.0, 190.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 10.0, 12.0, 28.0


@dataclass(frozen=True)
class Line:
    """One curve.

    Args:
        name: the tooltip, as HTML.
        values: one for each step. None where the line has a gap.
        style: a CSS class of the page.
    """

    name: str
    values: Sequence[float | None]
    style: str


@dataclass(frozen=True)
class Chart:
    """One chart.

    Args:
        title: the text for screen readers, as HTML.
        lines: the lines in drawing order.
        log: whether the axis is logarithmic. Otherwise it is linear from zero.
        band: the largest allowed values, drawn as an area below them. Empty for none.
    """

    title: str
    lines: Sequence[Line]
    log: bool = False
    band: Sequence[float] = ()


def as_svg(chart: Chart) -> str:
    """The chart as an element of a page.

    Args:
        chart: a chart whose lines have equal length.

    Example:
        >>> as_svg(Chart("a line", [Line("a", [1.0, 2.0], "c0")])).startswith("<svg ")
        True
    """
    steps = max(len(line.values) for line in chart.lines)
    numbers = [value for line in chart.lines for value in line.values if value is not None] + list(chart.band)
    positive = [value for value in numbers if value > 0] or [1.0]
    low = 10.0 ** math.floor(math.log10(min(positive))) if chart.log else 0.0
    high = 10.0 ** math.ceil(math.log10(max(positive))) if chart.log else 1.05 * max(positive)
    if low == high:
        high = 10 * low

    def across(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / max(1, steps - 1)

    def up(value: float) -> float:
        if chart.log:
            share = (math.log10(max(value, low)) - math.log10(low)) / (math.log10(high) - math.log10(low))
        else:
            share = value / high
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * min(1.0, share)

    parts = [f"<title>{chart.title}</title>"]
    if chart.band:
        points = " ".join(f"{across(step):.1f},{up(value):.1f}" for step, value in enumerate(chart.band))
        floor = _HEIGHT - _BOTTOM
        parts.append(
            f'<polygon class="band" points="{across(0):.1f},{floor} {points} {across(len(chart.band) - 1):.1f},{floor}"/>'
        )
    for value, label in _ticks(low, high, chart.log).items():
        y = up(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    parts += [
        f'<text x="{across(min(step, steps - 1)):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{step}</text>'
        for step in range(0, steps + 1, max(1, steps // 4))
    ]
    for line in chart.lines:
        parts += [
            f'<polyline class="{line.style}" points="{points}"><title>{line.name}</title></polyline>'
            for points in _stretches(line.values, across, up)
        ]
    return f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{chart.title}">{"".join(parts)}</svg>'


def _stretches(
    values: Sequence[float | None], across: Callable[[float], float], up: Callable[[float], float]
) -> list[str]:
    """The points of each stretch without gaps."""
    stretches: list[list[str]] = [[]]
    for step, value in enumerate(values):
        if value is None:
            stretches.append([])
        else:
            stretches[-1].append(f"{across(step):.1f},{up(value):.1f}")
    return [" ".join(points) for points in stretches if points]


def _ticks(low: float, high: float, log: bool) -> Mapping[float, str]:
    if log:
        first, last = round(math.log10(low)), round(math.log10(high))
        every = max(1, math.ceil((last - first) / 5))
        return {10.0**power: f"1e{power}" for power in range(first, last + 1, every)}
    rough = high / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
    return {count * step: f"{count * step:g}" for count in range(int(high / step) + 1)}
