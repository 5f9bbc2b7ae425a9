"""The results as two plots."""

import io
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.cells import OURS, Cell
from benchmarks.report import STEPS, in_order
from benchmarks.results import cells, exponent, frameworks

__all__ = ["plot"]

Results = Mapping[str, Any]

# Okabe and Ito's colours, which colour-blind people can tell apart, and a marker for each line for prints in grey.
_LOOKS = {
    OURS: ("#0072B2", "o"),
    "dense": ("#D55E00", "s"),
    "dense-compiled": ("#56B4E9", "P"),
    "sdpa": ("#009E73", "^"),
    "flax": ("#CC79A7", "v"),
    "memory-efficient-attention": ("#E69F00", "D"),
    "matmul": ("#000000", "x"),
    "matmul-blocks": ("#000000", "+"),
}
_FIT_FROM = 32
_CURVES = 64


def plot(results: Results, quantity: str) -> bytes:
    """A plot of time or memory against N, with a panel for each framework and logarithmic axes.

    The legend gives the exponent of a power law, fitted from N = 32² on. Below, the overhead of a call dominates.

    Args:
        results: results as `benchmarks.results` describes them.
        quantity: "time" or "memory".

    Returns:
        A PNG.
    """
    from matplotlib.figure import Figure

    names = frameworks(results)
    figure = Figure(figsize=(4.6 * len(names), 4.4), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, framework in zip(panels, names, strict=True):
        for name, step, points in _curves(results, framework, quantity):
            colour, marker = _LOOKS.get(name, ("#56B4E9", "P"))
            grows = exponent((n, y) for n, y in points if n >= _FIT_FROM**2)
            label = name if step == "train" else f"{name}, {STEPS[step]}"
            label += "" if grows is None else f"  ∝ N^{grows:.2f}"
            style = "-" if step == "train" else "--"
            panel.loglog(
                *zip(*points, strict=True),
                style,
                color=colour,
                marker=marker,
                label=label,
                linewidth=2.4 if name == OURS else 1.2,
            )
        panel.set(title=framework, xlabel="N = H·W")
        panel.grid(visible=True, which="major", alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8)
    panels[0].set_ylabel("seconds" if quantity == "time" else "MiB above the inputs")
    about = results["machine"]
    figure.suptitle(
        f"{'Time' if quantity == 'time' else 'Peak memory'}, C = {_CURVES}, {STEPS['train']}: "
        f"{about['cpu']}, {about['cores']} cores, float32",
        fontsize=10,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def _curves(
    results: Results, framework: str, quantity: str
) -> Iterator[tuple[str, str, list[tuple[int, float]]]]:
    """Name, step and points (N, value) of each line."""
    for step in ("train",) if quantity == "time" else ("train", "r1"):
        points: dict[str, dict[int, float]] = {}
        timed = list(_sides(results, framework, "time", step))
        for cell in _sides(results, framework, "memory", step):
            for name, record in cell["results"].items():
                if "peak_bytes" not in record:
                    continue
                if quantity == "memory":
                    points.setdefault(name, {})[cell["side"] ** 2] = record["peak_bytes"] / 2**20
                elif cell["side"] not in [other["side"] for other in timed]:
                    # too long to repeat
                    points.setdefault(name, {})[cell["side"] ** 2] = record["single_call_seconds"]
        for cell in timed if quantity == "time" else ():
            for name, record in cell["results"].items():
                if "seconds" in record:
                    points.setdefault(name, {})[cell["side"] ** 2] = record["seconds"]["median"]
        for name in in_order(points):
            yield name, step, sorted(points[name].items())


def _sides(results: Results, framework: str, measure: str, step: str) -> Iterator[dict[str, Any]]:
    """The cells of a curve."""
    wanted = Cell(measure, "core", step, _CURVES, 0).key  # type: ignore[arg-type]
    del wanted["side"]
    return cells(results, framework, **wanted)
