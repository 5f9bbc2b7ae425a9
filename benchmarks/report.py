"""The results as a Markdown page and as two plots."""

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.cells import CEILINGS, OURS
from benchmarks.problem import PRODUCTS
from benchmarks.results import exponent, median, peak, records
from benchmarks.targets import evaluate

__all__ = ["markdown", "plot"]

Results = Mapping[str, Any]

_LEVELS = {
    "core": "softmax(q kᵀ) v, given q, k and v",
    "flat": "The whole layer, as most copies have it",
    "pooled": "The whole layer, in the authors' pooled form",
}
_STEPS = {"forward": "forward", "train": "forward and backward", "r1": "R1 step"}

_TIME_NOTE = (
    "Each cell is the median of interleaved repeats, with the fastest and the slowest in brackets, then the ratio to ours. "
    "Every answer was compared with float64 before it was timed. *matmul* and *matmul-blocks* are not attention. They "
    "compute only the products of the step, of whole arrays and of query blocks. For derivatives these are the products of "
    "the formula, without recomputation. The faster of the two is the limit that this framework's matmul sets."
)
_MEMORY_NOTE = (
    "Each cell was measured in its own process, and includes the outputs. The seconds are those of this one call, the first "
    "one at this size. Where there is something to compile, it was compiled before."
)

# Okabe and Ito's colours, which colour-blind people can tell apart, and a marker for each line for prints in grey.
_LOOKS = {
    OURS: ("#0072B2", "o"),
    "dense": ("#D55E00", "s"),
    "sdpa": ("#009E73", "^"),
    "flax": ("#CC79A7", "v"),
    "memory-efficient-attention": ("#E69F00", "D"),
    "matmul": ("#000000", "x"),
    "matmul-blocks": ("#000000", "+"),
}
_FIT_FROM = 32
_CURVES = 64


def markdown(results: Results, plots: Mapping[str, str]) -> str:
    """The page.

    Args:
        results: results as `benchmarks.results` describes them.
        plots: file names of the plots by title.
    """
    lines = ["# Time and memory", "", *_header(results), ""]
    lines += [line for title, file in plots.items() for line in (f"![{title}]({file})", "")]
    if "device" not in results["machine"]:
        lines += ["## Targets", "", *_targets(results), ""]
    lines += ["## Time", "", _TIME_NOTE]
    for level, title in _LEVELS.items():
        for step, name in _STEPS.items():
            table = _times(results, level, step)
            if table:
                lines += ["", f"### {title}: {name}", "", *table]
    lines += ["", "## Peak memory above the inputs, core", "", _MEMORY_NOTE, "", *_memory(results)]
    reasons = _reasons(results)
    if reasons:
        lines += ["", "## Not measured", "", *reasons]
    return "\n".join(lines) + "\n"


def _header(results: Results) -> Iterator[str]:
    about = results["machine"]
    yield (
        f"{about['cpu']}, {about['cores']} cores, {about['memory_bytes'] / 2**30:.0f} GiB, {about['system']} "
        f"{about['architecture']}, Python {about['python']}. {_place(about)}float32, one sample (B = 1), Dk = C/8. "
        "`make bench` writes this page: do not edit it."
    )
    if results["mode"] not in ("full", "device"):
        yield ""
        yield f"**A {results['mode']} run: do not quote its numbers.**"
    yield ""
    yield from _table(
        ("framework", "date", "commit", "versions", "threads", "load before", "took"),
        [
            (
                framework,
                run["date"],
                f"`{run['commit']}`",
                ", ".join(f"{key} {value}" for key, value in run["versions"].items()),
                ", ".join(f"{key} {value}" for key, value in run["threads"].items()),
                f"{run['load_before']:.2f}",
                f"{run['seconds'] / 60:.1f} min",
            )
            for framework, run in results["frameworks"].items()
        ],
    )


def _targets(results: Results) -> list[str]:
    found: dict[str, dict[str, str]] = {}
    for finding in evaluate(results):
        mark = "" if finding.verdict == "met" else f" **{finding.verdict}**"
        if finding.verdict == "missed" and finding.share is not None:
            mark += f", at {finding.share:.2f} of the matmul rate"
        found.setdefault(finding.target.row, {})[finding.target.framework] = f"{finding}{mark}"
    frameworks = list(results["frameworks"])
    rows = [(row, *(cells.get(name, "") for name in frameworks)) for row, cells in found.items()]
    return [
        (
            "Each cell is the measurement, with the target in brackets. For each missed target of speed, the cell also gives "
            "the layer's rate on the products of the step, relative to the rate of the framework's own matmul, the faster of "
            "*matmul* and *matmul-blocks* below. A value near 1 means that this machine and framework have no more to give."
        ),
        "",
        *_table(("", *frameworks), rows),
    ]


def _times(results: Results, level: str, step: str) -> list[str]:
    cells = [
        (framework, channels, side, found)
        for framework in results["frameworks"]
        for channels in _channels(results, framework, "time", level, step)
        for side, found in sorted(records(results, framework, "time", level, step, channels).items())
    ]
    names = _names(found for *_, found in cells)
    if not cells:
        return []
    rows = []
    for framework, channels, side, found in cells:
        row = [framework, str(channels), f"{side}×{side}", *(_time(found.get(name)) for name in names)]
        if "matmul" in names:
            row += [_rate(found, step, channels, side), _share(found)]
        rows.append(row)
    head = ["framework", "C", "map", *names]
    if "matmul" in names:
        head += ["matmul, GF/s", "share of it"]
    return _table(head, rows)


def _rate(found: Mapping[str, Any], step: str, channels: int, side: int) -> str:
    """The matmul rate of the faster ceiling."""
    narrow, wide = PRODUCTS[step]
    flops = 2 * side**4 * (narrow * channels // 8 + wide * channels)
    seconds = [found[name]["seconds"]["median"] for name in CEILINGS if "seconds" in found.get(name, {})]
    return f"{flops / min(seconds) / 1e9:.0f}" if seconds else "–"


def _share(found: Mapping[str, Any]) -> str:
    """The rate of our layer on the same products, as a share of the rate of the faster ceiling."""
    seconds = [found[name]["seconds"]["median"] for name in CEILINGS if "seconds" in found.get(name, {})]
    ours = found.get(OURS, {})
    return f"{min(seconds) / ours['seconds']['median']:.2f}" if seconds and "seconds" in ours else "–"


def _place(about: Mapping[str, Any]) -> str:
    """The device, unless it is the CPU, which is already named."""
    if "device" not in about:
        return ""
    return f"On {about['device']} ({about.get('device_model', 'not known')}), float32 in full precision. "


def _time(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return ""
    if "seconds" not in record:
        return record["status"]
    seconds = record["seconds"]
    scale, unit = next(
        (scale, unit)
        for scale, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs"))
        if seconds["median"] * scale >= 1 or unit == "µs"
    )
    spread = f"({seconds['min'] * scale:.3g}–{seconds['max'] * scale:.3g})"
    ratio = f", {record['times_ours']:.2f} ×" if record.get("times_ours", 1.0) != 1.0 else ""
    return f"{seconds['median'] * scale:.3g} {unit} {spread}{ratio}"


def _memory(results: Results) -> list[str]:
    cells = [
        (framework, step, channels, side, found)
        for framework in results["frameworks"]
        for step in _STEPS
        for channels in _channels(results, framework, "memory", "core", step)
        for side, found in sorted(records(results, framework, "memory", "core", step, channels).items())
    ]
    names = _names(found for *_, found in cells)
    rows = [
        (
            framework,
            _STEPS[step],
            str(channels),
            f"{side}×{side}",
            *(_bytes(found.get(name)) for name in names),
        )
        for framework, step, channels, side, found in cells
    ]
    return _table(("framework", "step", "C", "map", *names), rows)


def _bytes(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return ""
    if "peak_bytes" not in record:
        return record["status"]
    return f"{record['peak_bytes'] / 2**20:.0f} MiB, {record['single_call_seconds']:.3g} s"


def _reasons(results: Results) -> list[str]:
    found: dict[str, list[str]] = {}
    for framework, run in results["frameworks"].items():
        for cell in run["cells"]:
            for name, record in cell["results"].items():
                if record["status"] != "ok":
                    where = f"{cell['level']} {cell['step']} C = {cell['channels']} at {cell['side']}×{cell['side']}"
                    line = f"{framework}, {name}: {record['status']}: {record['reason']}"
                    found.setdefault(line, []).append(f"{where} ({cell['measure']})")
    return [f"- {line} – {'; '.join(places)}" for line, places in found.items()]


def _channels(results: Results, framework: str, measure: str, level: str, step: str) -> list[int]:
    wanted = (measure, level, step)
    return sorted(
        {
            cell["channels"]
            for cell in results["frameworks"][framework]["cells"]
            if (cell["measure"], cell["level"], cell["step"]) == wanted
        }
    )


def _names(found: Iterator[Mapping[str, Any]]) -> list[str]:
    """The implementations in the order of their first cell, with the ceilings last."""
    return sorted(dict.fromkeys(name for each in found for name in each), key=lambda name: name in CEILINGS)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *cells]]


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

    frameworks = list(results["frameworks"])
    figure = Figure(figsize=(4.6 * len(frameworks), 4.4), layout="constrained")
    panels = figure.subplots(1, len(frameworks), sharey=True, squeeze=False)[0]
    for panel, framework in zip(panels, frameworks, strict=True):
        for name, step, points in _curves(results, framework, quantity):
            colour, marker = _LOOKS.get(name, ("#56B4E9", "P"))
            grows = exponent((n, y) for n, y in points if n >= _FIT_FROM**2)
            label = name if step == "train" else f"{name}, {_STEPS[step]}"
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
        f"{'Time' if quantity == 'time' else 'Peak memory'}, C = {_CURVES}, {_STEPS['train']}: "
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
    steps = ("train",) if quantity == "time" else ("train", "r1")
    for step in steps:
        timed = records(results, framework, "time", "core", step, _CURVES)
        weighed = records(results, framework, "memory", "core", step, _CURVES)
        for name in _names(iter((*timed.values(), *weighed.values()))):
            points: dict[int, float] = {}
            for side, found in weighed.items():
                record = found.get(name, {})
                if quantity == "memory":
                    value = peak(results, framework, step, _CURVES, side, name)
                    if value:
                        points[side**2] = value / 2**20
                elif "single_call_seconds" in record and side not in timed:
                    points[side**2] = record["single_call_seconds"]  # too long to repeat
            if quantity == "time":
                for side in timed:
                    seconds = median(results, framework, step, _CURVES, side, name)
                    if seconds is not None:
                        points[side**2] = seconds
            if points:
                yield name, step, sorted(points.items())
