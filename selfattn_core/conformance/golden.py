"""Golden vectors: cases with their float64 expectations as files, for backends in any language.

    python -m selfattn_core.conformance.golden FOLDER           # write what is not there yet
    python -m selfattn_core.conformance.golden FOLDER --check   # compute all of it again, compare every bit

The expectations are the spec's, computed in fifty-digit decimals and rounded once, so they do not depend on the
machine; the noise floors are those of float32 arithmetic in one fixed order, which do not either. A file that is there
is never replaced by one that differs: a spec that gives other values is another version of it (`spec.VERSION`).

docs/golden-vectors.md describes the files.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from selfattn_core import spec
from selfattn_core.conformance.cases import CASES, Case, Inputs, inputs
from selfattn_core.conformance.exact import fifty_digits, to_decimals, to_floats, to_singles
from selfattn_core.conformance.tolerance import ALLOWANCES, CAPS, EPS, FACTOR, ulps
from selfattn_core.weights import write_atomically

__all__ = ["FORMAT", "SUMS", "differences", "golden_cases", "vector", "write"]

Array = NDArray[Any]

FORMAT = "selfattn golden vector"
SUMS = "SHA256SUMS"

_FAMILIES = ("forward", "map", "vjp", "r1")
_CONFIG = ("channels", "qk_channels", "value_channels", "out_projection", "use_bias", "kv_pool")
"""The options that a file gives; those that came later are at their defaults."""

_POSITIONS = 60
"""Of the largest maps: their N×M attention is written out."""


def golden_cases() -> list[Case]:
    """The cases that have a file: the values and derivatives of every layer on maps of moderate size."""
    return [
        case for case in CASES if case.family in _FAMILIES and case.shape[1] * case.shape[2] <= _POSITIONS
    ]


def vector(case: Case) -> bytes:
    """The file of a case.

    Args:
        case: one of `golden_cases()`.

    Returns:
        A .safetensors file: the input (float32), the expectations (float64), and a description as JSON.
    """
    given = inputs(case, "float32")
    with fifty_digits():
        exact = _map(given, to_decimals)
        wanted = {name: to_floats(value) for name, value in _quantities(case, exact).items()}
        allowed = ulps(case, exact, wanted)
    single = {name: to_floats(value) for name, value in _quantities(case, _map(given, to_singles)).items()}
    eps = EPS["float32"]
    tolerances = {}
    for name, want in wanted.items():
        ulp = eps * allowed[name]
        error = float(np.abs(single[name] - want).max(initial=0))
        tolerances[name] = {
            "floor": error + ALLOWANCES[case.family] * ulp,
            "cap": CAPS[case.family] * ulp,
        }
    tensors = {"input.x": given.x}
    if case.family in ("vjp", "r1"):
        tensors["input.dy" if case.family == "vjp" else "input.w"] = given.dy
    tensors |= {f"params.{name}": value for name, value in given.params.items()}
    tensors |= {f"want.{name}": value for name, value in wanted.items()}
    description = {
        "format": FORMAT,
        "version": spec.VERSION,
        "case": case.id,
        "family": case.family,
        "title": case.title,
        "config": {name: getattr(case.config, name) for name in _CONFIG},
        "factor": FACTOR,
        "tolerances": tolerances,
    }
    contiguous = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
    # One entry: the order of several is not fixed.
    content = safetensors.numpy.save(contiguous, {"golden": json.dumps(description, ensure_ascii=True)})
    return bytes(content)


def write(folder: Path) -> list[str]:
    """Write the files that are not there yet, and the sums of all.

    Args:
        folder: must exist.

    Returns:
        The names of the files that were written.

    Raises:
        ValueError: if a file that is there has other content at the same version of the spec; nothing is written.
    """
    contents = dict(_contents())
    changed = [
        name
        for name, content in contents.items()
        if (folder / name).exists() and (folder / name).read_bytes() != content
    ]
    if same := [name for name in changed if _version(folder / name) == spec.VERSION]:
        raise ValueError(
            f"{', '.join(same)}: what the spec gives is not what is there, and both are of version {spec.VERSION}; "
            "a function that gives other values is another one: raise VERSION in selfattn_core/spec.py if it is meant."
        )
    written = [name for name in contents if name in changed or not (folder / name).exists()]
    for name in written:
        write_atomically(folder / name, contents[name], overwrite=True)
    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in contents.items())
    write_atomically(folder / SUMS, sums.encode(), overwrite=True)
    return written


def differences(folder: Path, cases: list[Case] | None = None) -> list[str]:
    """Compute files again and say which are not there bit for bit.

    Args:
        folder: of the files.
        cases: which; by default all.

    Returns:
        One line for each file that differs, naming the tensors.
    """
    lines = []
    for name, content in _contents(cases):
        if not (folder / name).exists():
            lines.append(f"{name}: is not there")
        elif (folder / name).read_bytes() != content:
            lines.append(f"{name}: {_difference((folder / name).read_bytes(), content)}")
    return lines


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--check", is_flag=True, help="Write nothing; exit 1 if a file is not what it should be.")
def main(folder: Path, check: bool) -> None:
    """Write the golden vectors to FOLDER, or check those that are there."""
    if check:
        lines = differences(folder)
        click.echo("\n".join(lines) or f"{len(golden_cases())} files are there bit for bit")
        if lines:
            raise click.exceptions.Exit(1)
        return
    try:
        written = write(folder)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    click.echo(f"{len(written)} files written, {len(golden_cases()) - len(written)} there already")


def _contents(cases: list[Case] | None = None) -> Iterator[tuple[str, bytes]]:
    for case in golden_cases() if cases is None else cases:
        yield f"{case.id}.safetensors", vector(case)


def _map(given: Inputs, number: Any) -> Inputs:
    params = {name: number(value) for name, value in given.params.items()}
    return Inputs(params, number(given.x), number(given.dy))


def _quantities(case: Case, given: Inputs) -> Mapping[str, Array]:
    if case.family == "forward":
        return {"y": spec.forward(case.config, given.params, given.x)}
    if case.family == "map":
        return {"map": spec.attention_map(case.config, given.params, given.x)}
    if case.family == "vjp":
        return spec.vjp(case.config, given.params, given.x, given.dy)
    value, gradients = spec.r1(case.config, given.params, given.x, given.dy)
    return {"r1": np.array([value], object)} | gradients


def _version(path: Path) -> int:
    with safetensors.safe_open(path, "numpy") as file:
        return int(json.loads(file.metadata()["golden"])["version"])


def _difference(there: bytes, computed: bytes) -> str:
    try:
        old, new = safetensors.numpy.load(there), safetensors.numpy.load(computed)
    except safetensors.SafetensorError as error:
        return f"cannot be read: {error}"
    names = [
        name
        for name in {**old, **new}
        if name not in old or name not in new or not _equal(old[name], new[name])
    ]
    return f"{', '.join(names) or 'the description'} would be different"


def _equal(one: Array, other: Array) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


if __name__ == "__main__":
    main()
