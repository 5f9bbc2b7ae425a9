"""The results as a Markdown page."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.cells import CEILINGS, OURS, Cell
from benchmarks.products import PRODUCTS
from benchmarks.results import cells, frameworks
from benchmarks.targets import evaluate

__all__ = ["STEPS", "in_order", "markdown"]

Results = Mapping[str, Any]
Stored = Mapping[str, Any]

STEPS = {"forward": "forward", "train": "forward and backward", "r1": "R1 step"}

_LEVELS = {
    "core": "softmax(q kᵀ) v, given q, k and v",
    "flat": "The whole layer, as most copies have it",
    "pooled": "The whole layer, in the authors' pooled form",
}

_TIMES = {
    "sizes": (
        "Time",
        (
            "float32, one sample. Each entry is a median, with the fastest and the slowest in brackets, and then the multiple of "
            "our time. All implementations of a row took turns in one process. Every answer was compared with float64. "
            "*matmul* and *matmul-blocks* are not attention. They compute the matrix products of the step and nothing else: of "
            "whole arrays, and of query blocks. For derivatives these are the products of the formula, without those that "
            "compute something again. The faster of the two shows how fast this framework can multiply. The last column "
            "compares our time with it."
        ),
    ),
    "small": ("Small maps", "float32, with one sample and with sixteen (B)."),
    "peaked": (
        "Peaked maps",
        (
            "float32, one sample. The scores have the standard deviation in the column. *ours, diffuse map* is our time where "
            "it is 1, in the same process and in turns."
        ),
    ),
    "bfloat16": (
        "bfloat16",
        (
            "One sample. The core has operands in bfloat16. The layers have float32 parameters, and compute in the mixed "
            "precision of their framework: autocast in PyTorch, a mixed policy in Keras, `dtype` in Flax. *ours in float32* is "
            "our time for float32 operands, in the same process and in turns."
        ),
    ),
}
_MEMORY_NOTE = (
    "Each entry was measured in its own process, and includes the outputs. The seconds are those of this one call, the first "
    "one at this size. Where there is something to compile, it was compiled before."
)
_TARGETS_NOTE = (
    "Each entry is the measurement, with the target in brackets. Where a target of speed was missed, the entry also compares "
    "our time with that of the matrix products alone (*matmul* below). Near 1.00, this framework has no more to give on this "
    "machine. Where a target covers several measurements, the entry is the worst of them."
)
_AGAINST_NOTE = (
    "Our implementation in this build and in another one. Two processes took turns, one for each build. An entry is the "
    "ratio of the two medians, new over old. In brackets are the quartiles of the ratios of single turns. For peaks of "
    "memory, the medians of up to three processes are compared."
)


def markdown(results: Results, plots: Mapping[str, str]) -> str:
    """The page.

    Args:
        results: results as `benchmarks.results` describes them.
        plots: file names of the plots by title.
    """
    lines = ["# Time and memory", "", *_header(results), ""]
    lines += [line for title, file in plots.items() for line in (f"![{title}]({file})", "")]
    if "device" not in results["machine"]:
        lines += ["## Targets", "", _TARGETS_NOTE, "", *_targets(results), ""]
    for group, (title, note) in _TIMES.items():
        tables = [
            line
            for level in _LEVELS
            for step in STEPS
            if (table := _times(results, group, level, step))
            for line in ("", f"### {_LEVELS[level]}: {STEPS[step]}", "", *table)
        ]
        if tables:
            lines += [f"## {title}", "", note, *tables, ""]
    if memory := _memory(results):
        lines += ["## Peak memory above the inputs, core", "", _MEMORY_NOTE, "", *memory, ""]
    if against := _against(results):
        lines += ["## Against another build", "", _AGAINST_NOTE, *against, ""]
    if reasons := _reasons(results):
        lines += ["## Not measured, or less exact", "", *reasons, ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _header(results: Results) -> Iterator[str]:
    about = results["machine"]
    known = about.get("instructions")
    words = "Its instructions are not known. " if known is None else f"It has {_listed(known)}. "
    yield (
        f"{about['cpu']}, {about['cores']} cores, {about['memory_bytes'] / 2**30:.0f} GiB, {about['system']} "
        f"{about['architecture']}, Python {about['python']}. {words}{_place(about)}Dk = C/8. `make bench` writes this "
        "page: do not edit it."
    )
    if results["mode"] not in ("full", "device"):
        yield ""
        yield f"**A {results['mode']} run: do not quote its numbers.**"
    yield ""
    yield from _table(
        ("framework", "cells", "date", "commit", "versions", "threads", "variables", "load before", "took"),
        [
            (
                run["framework"],
                run["group"] + (f", against `{run['against']}`" if run["against"] else ""),
                run["date"],
                f"`{run['commit']}`",
                _pairs(run["versions"]),
                _pairs(run["threads"]),
                _pairs(run.get("environment", {})),
                f"{run['load_before']:.2f}",
                f"{run['seconds'] / 60:.1f} min",
            )
            for run in results["runs"]
        ],
    )


def _pairs(named: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in named.items())


def _listed(words: Sequence[str]) -> str:
    if len(words) < 2:
        return words[0] if words else "no instructions that speed up products"
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _place(about: Mapping[str, Any]) -> str:
    """The device, unless it is the CPU, which is already named."""
    if "device" not in about:
        return ""
    return f"On {about['device']} ({about.get('device_model', 'not known')}), float32 in full precision. "


def _targets(results: Results) -> list[str]:
    found: dict[str, dict[str, str]] = {}
    for finding in evaluate(results):
        mark = "" if finding.verdict == "met" else f" **{finding.verdict}**"
        if finding.verdict == "missed" and finding.share is not None:
            mark += f", {1 / finding.share:.2f} × the time of the products"
        if finding.words:
            mark += f", {finding.words}"
        found.setdefault(finding.target.row, {})[finding.target.framework] = f"{finding}{mark}"
    names = frameworks(results)
    return _table(
        ("", *names), [(row, *(cells.get(name, "") for name in names)) for row, cells in found.items()]
    )


def _times(results: Results, group: str, level: str, step: str) -> list[str]:
    wanted = {"group": group, "measure": "time", "level": level, "step": step}
    found = [(name, cell) for name in frameworks(results) for cell in _sorted(results, name, **wanted)]
    if not found:
        return []
    names = in_order(name for _, cell in found for name in cell["results"])
    columns = [name for name in ("batch", "logits") if any(cell[name] not in (1, None) for _, cell in found)]
    rows = []
    for framework, cell in found:
        row = [framework, str(cell["channels"]), f"{cell['side']}×{cell['side']}"]
        row += [f"{cell[column]:g}" for column in columns]
        row += [_time(cell["results"].get(name)) for name in names]
        if "matmul" in names:
            row += [_rate(cell), _over_products(cell)]
        rows.append(row)
    titles = {"batch": "B", "logits": "scores"}
    head = ["framework", "C", "map", *(titles[column] for column in columns), *names]
    return _table([*head, *(("matmul, GF/s", "ours / matmul") if "matmul" in names else ())], rows)


def _sorted(results: Results, framework: str, **wanted: Any) -> list[Stored]:
    def place(cell: Stored) -> tuple[Any, ...]:
        kind = list(_LEVELS).index(cell["level"]), list(STEPS).index(cell["step"]), cell["dtype"] != "float32"
        return (*kind, cell["logits"] or 0, cell["channels"], cell["side"], cell["batch"])

    return sorted(cells(results, framework, **wanted), key=place)


def _products(cell: Stored) -> float | None:
    """Seconds of the faster ceiling."""
    found = (cell["results"].get(name, {}) for name in CEILINGS)
    return min((record["seconds"]["median"] for record in found if "seconds" in record), default=None)


def _rate(cell: Stored) -> str:
    """The rate of the faster ceiling."""
    narrow, wide = PRODUCTS[cell["step"]]
    flops = 2 * cell["batch"] * cell["side"] ** 4 * (narrow * cell["channels"] // 8 + wide * cell["channels"])
    seconds = _products(cell)
    return f"{flops / seconds / 1e9:.0f}" if seconds else "–"


def _over_products(cell: Stored) -> str:
    """Our time over that of the faster ceiling."""
    seconds, ours = _products(cell), cell["results"].get(OURS, {})
    return f"{ours['seconds']['median'] / seconds:.2f}" if seconds and "seconds" in ours else "–"


def _time(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return ""
    if "seconds" not in record:
        return str(record["status"])
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
    found = [
        (framework, cell)
        for framework in frameworks(results)
        for step in STEPS
        for dtype in ("float32", "bfloat16")
        for cell in _sorted(results, framework, measure="memory", level="core", step=step, dtype=dtype)
    ]
    if not found:
        return []
    names = in_order(name for _, cell in found for name in cell["results"])
    rows = [
        (
            framework,
            STEPS[cell["step"]],
            cell["dtype"],
            str(cell["channels"]),
            f"{cell['side']}×{cell['side']}",
            *(_bytes(cell["results"].get(name)) for name in names),
        )
        for framework, cell in found
    ]
    return _table(("framework", "step", "dtype", "C", "map", *names), rows)


def _bytes(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return ""
    if "peak_bytes" not in record:
        return str(record["status"])
    return f"{record['peak_bytes'] / 2**20:.0f} MiB, {record['single_call_seconds']:.3g} s"


def _against(results: Results) -> Iterator[str]:
    """A table for time and one for memory: a row for each cell, a column for each framework."""
    names = frameworks(results)
    for measure, title in (("time", "Time"), ("memory", "Peak memory")):
        rows: dict[str, dict[str, str]] = {}
        for name in names:
            for cell in _sorted(results, name, against=True, measure=measure):
                rows.setdefault(_words(cell), {})[name] = _new_over_old(cell["results"])
        if rows:
            yield from ("", f"### {title}, new over old", "")
            yield from _table(
                ("", *names), [(row, *(found.get(name, "") for name in names)) for row, found in rows.items()]
            )


def _new_over_old(found: Mapping[str, Any]) -> str:
    now = found["now"]
    if "of_before" not in now:
        return next((record["status"] for record in found.values() if record["status"] != "ok"), "–")
    quartiles = now.get("quartiles")
    return f"{now['of_before']:.3f}" + ("" if quartiles is None else " ({:.3f}–{:.3f})".format(*quartiles))


def _words(cell: Stored) -> str:
    return str(Cell(**{key: value for key, value in cell.items() if key != "results"}))


def _reasons(results: Results) -> list[str]:
    found: dict[str, list[str]] = {}
    for run in results["runs"]:
        for cell in run["cells"]:
            for name, record in cell["results"].items():
                if record["status"] != "ok":
                    line = f"{run['framework']}, {name}: {record['status']}: {record['reason']}"
                    found.setdefault(line, []).append(f"{_words(cell)} ({cell['measure']})")
    return [f"- {line} – {'; '.join(dict.fromkeys(places))}" for line, places in found.items()]


def in_order(names: Iterable[str]) -> list[str]:
    """Names of implementations in the order of their first cell, with the ceilings last."""
    return sorted(dict.fromkeys(names), key=lambda name: name in CEILINGS)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = [[entry.replace("|", "\\|") for entry in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *escaped]]
