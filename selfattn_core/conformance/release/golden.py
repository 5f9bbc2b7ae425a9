"""Writes and checks golden vectors: cases as files with the expected float64 values, for layers in any language.

    python -m selfattn_core.conformance.release.golden FOLDER           # write the missing files
    python -m selfattn_core.conformance.release.golden FOLDER --check   # compute all files again, and compare every bit

The spec computes the expected values in fifty-digit decimals and rounds them once. The noise floors use float32 arithmetic
in one fixed order. So neither depends on the machine.

An existing file is replaced only if a number in it changes too. `version` is the version of the function (`spec.VERSION`).
Changed arrays need a new version. `edition` is the edition of the files (`EDITION`). Changed tolerances or descriptions with
equal arrays need a new edition. Files of new cases need neither.

docs/golden-vectors.md describes the files.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from selfattn_core import spec
from selfattn_core.arrays import Array
from selfattn_core.conformance.cases.case import Case
from selfattn_core.conformance.cases.computations import COMPUTATIONS
from selfattn_core.conformance.cases.families import FAMILIES
from selfattn_core.conformance.cases.inputs import Inputs, inputs
from selfattn_core.conformance.cases.table import CASES
from selfattn_core.conformance.questions.ask import answers
from selfattn_core.conformance.reference import FusedLayer, LayerReference, Reference
from selfattn_core.conformance.release.decimals import fifty_digits, to_decimals, to_floats, to_singles
from selfattn_core.conformance.verdicts.expected import expectations
from selfattn_core.conformance.verdicts.tolerance import FACTOR
from selfattn_core.files.safetensors import SafetensorsError, read_all, whole_file
from selfattn_core.files.writing import write_atomically

__all__ = ["EDITION", "FORMAT", "SUMS", "differences", "golden_cases", "vector", "write"]


FORMAT = "selfattn golden vector"
SUMS = "SHA256SUMS"

EDITION = 3
"""The edition of the files. Raise it if a file changes and its arrays do not. CHANGELOG.md lists the changes."""

_CONFIG = (
    "channels",
    "qk_channels",
    "value_channels",
    "out_projection",
    "use_bias",
    "kv_pool",
    "spectral_norm",
)
"""The options in a file. Newer options have their defaults."""

_OUTPUT_GRADIENTS = {"vjp": "dy", "training_vjp": "dy", "mixed": "dy", "r1": "w"}
"""The name of the gradient of y, by computation."""

_POSITIONS = 60
"""The largest number of positions, because a file contains the whole N×M map."""


def golden_cases() -> list[Case]:
    """The cases that have a file: values and derivatives of every layer, on feature maps of moderate size."""
    return [
        case
        for case in CASES
        if FAMILIES[case.family].golden
        and COMPUTATIONS[case.computation].values
        and case.shape[1] * case.shape[2] <= _POSITIONS
        # A file contains one question in float32, and no views. It cannot test what earlier calls leave.
        and not case.view
        and not case.passes
        and not case.narrow
        and case.computation != "evaluation"
    ]


def vector(case: Case) -> bytes:
    """The file of a case.

    Args:
        case: one of `golden_cases()`.

    Returns:
        A .safetensors file with the input (float32), the expected values (float64), and a description as JSON.
    """
    given = inputs(case, "float32")
    with fifty_digits():
        exact = _map(given, to_decimals)
        wanted = _answers(case, exact)
        singles = [
            _answers(case, _map(given, to_singles), right)
            for right in (Reference(), LayerReference(FusedLayer))
        ]
        errors = {
            name: max(float(np.abs(single[name] - want).max(initial=0)) for single in singles)
            for name, want in wanted.items()
        }
        expected = expectations(case, exact, wanted, errors, "float32")
    computation = _computation(case)
    tensors = {"input.x": given.x}
    if gradient := _OUTPUT_GRADIENTS.get(computation):
        tensors[f"input.{gradient}"] = given.dy
    tensors |= {f"params.{name}": value for name, value in given.params.items()}
    tensors |= {f"cotangents.{name}": value for name, value in given.cotangents.items()}
    tensors |= {f"want.{name}": value for name, value in wanted.items()}
    description = {
        "format": FORMAT,
        "version": spec.VERSION,
        "edition": EDITION,
        "case": case.id,
        "family": case.family,
        "computation": computation,
        "title": case.title,
        "config": {name: getattr(case.config, name) for name in _CONFIG},
        "factor": FACTOR,
        "tolerances": {name: {"floor": each.floor, "cap": each.cap} for name, each in expected.items()},
    }
    return whole_file(tensors, {"golden": json.dumps(description, ensure_ascii=True)})


def write(folder: Path) -> list[str]:
    """Write the missing files, and the checksums of all files.

    Args:
        folder: an existing folder.

    Returns:
        The names of the files that were written.

    Raises:
        ValueError: if an existing file has other arrays at the same version, or another description at the same edition.
            Then nothing is written.
    """
    contents = dict(_contents())
    changed = [
        name
        for name, content in contents.items()
        if (folder / name).exists() and (folder / name).read_bytes() != content
    ]
    refusals = {name: _refusal(folder / name, contents[name]) for name in changed}
    if lines := [f"{name}: {why}" for name, why in refusals.items() if why]:
        raise ValueError("nothing is written:\n  " + "\n  ".join(lines))
    written = [name for name in contents if name in changed or not (folder / name).exists()]
    for name in written:
        write_atomically(folder / name, contents[name], overwrite=True)
    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in contents.items())
    write_atomically(folder / SUMS, sums.encode(), overwrite=True)
    return written


def differences(folder: Path, cases: list[Case] | None = None) -> list[str]:
    """Compute the files again, and compare them with a folder bit for bit.

    Args:
        folder: the folder with the files.
        cases: the cases. By default `golden_cases()`.

    Returns:
        One line for each missing or different file. It names the tensors that differ.
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
@click.option("--check", is_flag=True, help="Write nothing; exit 1 if a file is missing or differs.")
def main(folder: Path, check: bool) -> None:
    """Write the golden vectors to FOLDER, or check the files in it."""
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


def _computation(case: Case) -> str:
    """The computation, as the files name it."""
    return "training_pass" if case.computation == "spectral_norm" else case.computation


def _map(given: Inputs, number: Any) -> Inputs:
    params = {name: number(value) for name, value in given.params.items()}
    cotangents = {name: number(value) for name, value in given.cotangents.items()}
    return Inputs(params, number(given.x), number(given.dy), cotangents=cotangents)


def _answers(case: Case, given: Inputs, right: Reference | None = None) -> dict[str, Array]:
    """The answers of the spec, or of a variant of it, rounded to float64. Scalars are arrays with one entry."""
    found = answers(right or Reference(), case, given, "object", "channels_last")
    return {name: np.atleast_1d(to_floats(value)) for name, value in found.items()}


def _refusal(path: Path, content: bytes) -> str:
    """The reason why this content may not replace an existing file. Empty if it may."""
    try:
        version, edition, arrays = _opened(path)
    except (KeyError, TypeError, ValueError) as error:
        return f"cannot be read ({error}): delete it to write it again"
    if version < spec.VERSION:
        return ""
    if names := _differing(arrays, read_all(io.BytesIO(content))[1]):
        return (
            f"{', '.join(names)} would be different, but the version is still {version}: "
            "raise VERSION in selfattn_core/spec.py if the function has changed on purpose"
        )
    if edition >= EDITION:
        return (
            f"the description would be different, but the edition is still {edition}: "
            "raise EDITION in selfattn_core/conformance/release/golden.py if this is on purpose"
        )
    return ""


def _opened(path: Path) -> tuple[int, int, dict[str, Array]]:
    """Version, edition and arrays of a file."""
    with path.open("rb") as file:
        metadata, arrays = read_all(file)
    description = json.loads(metadata["golden"])
    # Files of the first edition do not contain the edition.
    return int(description["version"]), int(description.get("edition", 1)), arrays


def _difference(there: bytes, computed: bytes) -> str:
    try:
        _, old = read_all(io.BytesIO(there))
    except SafetensorsError as error:
        return f"cannot be read: {error}"
    names = _differing(old, read_all(io.BytesIO(computed))[1])
    return f"{', '.join(names) or 'the description'} would be different"


def _differing(old: dict[str, Array], new: dict[str, Array]) -> list[str]:
    return [
        name
        for name in {**old, **new}
        if name not in old or name not in new or not _equal(old[name], new[name])
    ]


def _equal(one: Array, other: Array) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


if __name__ == "__main__":
    main()
