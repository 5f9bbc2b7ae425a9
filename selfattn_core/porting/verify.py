"""Verifies a port: the target's layer and the source's own output are compared with the definition."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from selfattn_core import spec
from selfattn_core.arrays import Array
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.conformance.backends import REGISTRY
from selfattn_core.conformance.cases.case import Case
from selfattn_core.conformance.cases.inputs import Inputs
from selfattn_core.conformance.execution.environment import environment
from selfattn_core.conformance.verdicts.expected import expect_on
from selfattn_core.conformance.verdicts.tolerance import FACTORS, measure
from selfattn_core.installed import missing_modules
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats.scratch import scratch_folder
from selfattn_core.porting.report import Check

__all__ = ["BACKENDS", "check_framework", "check_output", "designed_input", "main", "read_io"]

Layer = tuple[SelfAttentionConfig, Mapping[str, Array]]

BACKENDS: Mapping[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "keras": ("keras-tensorflow", "keras-jax", "keras-torch"),
    "flax": ("flax-nnx", "flax-linen"),
}
"""The backends of the conformance kit that have a target's layer, by dialect. For Keras only the first installed one is used."""

_TIMEOUT = 300
_LOGITS = 3.0


def designed_input(
    config: SelfAttentionConfig, params: Mapping[str, Array], *, size: tuple[int, int] | None = None
) -> tuple[dict[str, Array], Array, str]:
    """An input that reveals a wrong layer: H ≠ W, a map between flat and one-hot, gamma not 0.

    Args:
        config: the layer.
        params: its arrays.
        size: (H, W). By default a few positions, so that a pooling window is cut off.

    Returns:
        The parameters in float32 or wider, x (2, H, W, C) in their dtype, and a note on a changed gamma, "" if unchanged.
    """
    dtype = np.result_type(params["gamma"].dtype, np.float32)
    generator = np.random.Generator(np.random.PCG64(0))
    side = config.kv_pool
    height, width = size or (2 * side + 1, 3 * side + 1)
    x = generator.standard_normal((2, height, width, config.channels))
    used = {name: array.astype(dtype) for name, array in params.items()}
    changed = ""
    if not params["gamma"].any():
        used["gamma"] = np.full(1, 0.7, dtype)
        changed = "with gamma = 0.7, because gamma = 0 would hide every error"
    logits = spec.magnitudes(config, {n: a.astype(np.float64) for n, a in used.items()}, x)["logits"]
    # Very large or very small logits would hide the keys. Logits from biases do not grow with x.
    scale = float(np.sqrt(_LOGITS * 3 / max(logits, 1e-6)))
    return used, (x * np.clip(scale, 1e-3, 1e3)).astype(dtype), changed


def check_output(
    name: str, config: SelfAttentionConfig, params: Mapping[str, Array], x: Array, y: Array
) -> Check:
    """Compare an output with the definition, within the limits of the conformance kit.

    Args:
        name: the name of the check.
        config: the layer.
        params: its arrays.
        x: (B, H, W, C).
        y: (B, H, W, C), from another implementation. Its precision is the coarser of its dtype and the parameters' dtype.
    """
    dtypes = (y.dtype, params["gamma"].dtype)
    coarse = str(max((dtype for dtype in dtypes if dtype.kind == "f"), key=lambda dtype: np.finfo(dtype).eps))
    case = Case(name, "forward", name, config, x.shape[:3], dtypes=(coarse,))
    noisy = "float16" if coarse == "float16" else "float32"
    given, narrow = (_inputs(params, x, dtype) for dtype in ("float64", noisy))
    expectation = expect_on(case, given, narrow, coarse)["y"]
    verdict = measure("y", y.astype(np.float64), expectation, FACTORS[coarse])
    limit = min(FACTORS[coarse] * expectation.floor, expectation.cap)
    attention = float(np.abs(expectation.want - x).max(initial=0))
    detail = f"largest error {verdict.error:.2g}, and the noise of {coarse} allows {limit:.2g}"
    if attention <= limit:
        return Check(
            name,
            "not run",
            f"the noise of {coarse} ({limit:.2g}) is larger than what the layer adds to x ({attention:.2g}), so any answer would "
            "pass",
        )
    return Check(name, "passed" if verdict.passed else "failed", detail)


def _inputs(params: Mapping[str, Array], x: Array, dtype: str) -> Inputs:
    maps = x.astype(dtype)
    return Inputs({name: array.astype(dtype) for name, array in params.items()}, maps, np.zeros_like(maps))


def check_framework(dialect: str, blocks: Mapping[str, Layer]) -> list[Check]:
    """Compare the layers of the target's framework with the definition, each backend in its own process.

    Args:
        dialect: the dialect of the target.
        blocks: config and arrays of each layer in the target, by name.
    """
    if dialect not in BACKENDS:
        return [Check("target's layer", "not run", f"runs only for {', '.join(BACKENDS)}, not for {dialect}")]
    names = BACKENDS[dialect]
    missing = {name: missing_modules(REGISTRY[name].requires) for name in names}
    ready = [name for name in names if not missing[name]]
    if not ready:
        name = names[0]
        how = f"pip install 'selfattn[{REGISTRY[name].extra}]'"
        return [Check("target's layer", "not run", f"{', '.join(missing[name])} not installed: {how}")]
    chosen = ready[:1] if dialect == "keras" else ready
    inputs = {block: designed_input(*layer) for block, layer in blocks.items()}
    return [check for name in chosen for check in _run_backend(name, blocks, inputs)]


def _run_backend(
    name: str, blocks: Mapping[str, Layer], inputs: Mapping[str, tuple[dict[str, Array], Array, str]]
) -> list[Check]:
    entry = REGISTRY[name]
    with scratch_folder() as folder:
        for number, (params, x, _) in enumerate(inputs.values()):
            arrays = {f"param {key}": value for key, value in params.items()} | {"x": x}
            np.savez(f"{folder}/{number}.npz", allow_pickle=False, **arrays)
        configs = [config.to_dict() for config, _ in blocks.values()]
        job = {"target": entry.target, "configs": configs, "folder": str(folder)}
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        failure = _run_job(f"{folder}/job.json", entry.in_full)
        if failure:
            return [Check(f"{name}'s layer", "failed", failure)]
        outputs = [np.load(f"{folder}/{number}.npy", allow_pickle=False) for number in range(len(blocks))]
    checks = []
    for (block, (config, _)), (params, x, changed), y in zip(
        blocks.items(), inputs.values(), outputs, strict=True
    ):
        title = f"{name}'s layer{f', {block}' if block else ''}"
        found = check_output(title, config, params, x, y)
        checks.append(replace(found, detail=f"{found.detail}{f', {changed}' if changed else ''}"))
    return checks


def _run_job(job: str, own: Mapping[str, str]) -> str:
    """The reason why the process gave no answers, "" if it did."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "selfattn_core.porting.verify", job],
            env=environment(own),
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return f"gave no answer in {_TIMEOUT} s"
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"its process ended with {done.returncode}: {last}" if done.returncode else ""


def main(job_file: str) -> None:
    """Run the job of a backend's process: build the framework's layers and store their outputs."""
    from selfattn_core.conformance.backends import resolve

    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    backend = resolve(job["target"])
    for number, options in enumerate(job["configs"]):
        with np.load(f"{job['folder']}/{number}.npz", allow_pickle=False) as arrays:
            x = arrays["x"]
            params = {key.removeprefix("param "): arrays[key] for key in arrays.files if key != "x"}
        config = SelfAttentionConfig.from_dict(options)
        model = backend.build(config, params, str(x.dtype), "channels_last")
        y = np.asarray(backend.forward(model, x))
        np.save(f"{job['folder']}/{number}.npy", y, allow_pickle=False)


def read_io(path: Path, layout: str, opened: Callable[[Path], Any]) -> tuple[Array, Array]:
    """Read x and y from an `io.npz`, as (B, H, W, C).

    Args:
        path: the path of the file.
        layout: the layout of its arrays, "BCHW" or "BHWC".
        opened: a function that opens a file of tensors.

    Raises:
        PortError: if x or y is missing, empty or not finite, or if they are not two floating-point arrays of one shape with
            four axes.
    """
    with opened(path) as tensors:
        lacking = [name for name in ("x", "y") if name not in tensors]
        if lacking:
            reasons = "".join(f"; {tensors.left_out[name]}" for name in lacking if name in tensors.left_out)
            raise PortError(
                f"{path}: lacks {' and '.join(lacking)}{reasons}. Expected x and y, an input and the output of the source's layer."
            )
        x, y = tensors.read("x"), tensors.read("y")
    if x.ndim != 4 or x.shape != y.shape or x.dtype.kind != "f" or y.dtype.kind != "f":
        raise PortError(
            f"{path}: x is {x.dtype} {x.shape} and y is {y.dtype} {y.shape}. Expected two floating-point arrays of one shape, "
            f"({', '.join(layout)})."
        )
    bad = [name for name, array in (("x", x), ("y", y)) if not np.isfinite(array).all()]
    if bad or not x.size:
        what = f"there is NaN or infinity in {' and '.join(bad)}" if bad else f"x and y are empty, {x.shape}"
        raise PortError(f"{path}: {what}, so nothing can be compared. Expected finite values.")
    return (x.transpose(0, 2, 3, 1), y.transpose(0, 2, 3, 1)) if layout == "BCHW" else (x, y)


if __name__ == "__main__":
    main(sys.argv[1])
