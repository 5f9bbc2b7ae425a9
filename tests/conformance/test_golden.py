"""The golden vectors: right, whole, reproducible bit for bit, of this version, and readable without this library."""

import decimal
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner

from selfattn_core import spec
from selfattn_core.conformance import golden
from selfattn_core.conformance.cases import CASES
from selfattn_core.conformance.exact import Single, fifty_digits, to_decimals, to_floats, to_singles

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "golden-vectors"
CASES_BY_ID = {case.id: case for case in golden.golden_cases()}
# One of each family, and of each way a config can be: flat, pooled, with and without an out projection.
SOME = ["SA-FWD-002", "SA-MAP-007", "SA-VJP-016", "SA-GAN-009", "SA-VJP-010", "SA-FWD-013", "SA-GAN-014"]


def listed() -> dict[str, str]:
    lines = (FOLDER / golden.SUMS).read_text(encoding="ascii").splitlines()
    return {name: digest for digest, name in (line.split("  ") for line in lines)}


def test_every_case_has_a_file_and_every_file_its_sum():
    assert set(listed()) == {f"{case}.safetensors" for case in CASES_BY_ID}
    assert {path.name for path in FOLDER.iterdir()} == {*listed(), golden.SUMS}
    for name, digest in listed().items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest, name
    families = {case.family for case in CASES_BY_ID.values()}
    assert families == {"forward", "map", "vjp", "r1"}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_500_000


def test_vectors_of_this_version_are_frozen():
    """Changed vectors are another version of the function: raise spec.VERSION, and freeze the new sums beside these."""
    frozen = Path(__file__).parent / f"golden_vectors.{spec.VERSION}.sha256"
    assert frozen.exists(), f"freeze this version's vectors: cp golden-vectors/SHA256SUMS {frozen}"
    lines = frozen.read_text(encoding="ascii").splitlines()
    assert len(lines) >= 60
    for line in lines:
        digest, name = line.split("  ")
        assert listed().get(name) == digest, f"{name} has changed: raise VERSION in selfattn_core/spec.py"


@pytest.mark.parametrize("case", SOME)
def test_files_are_reproduced_bit_for_bit(case):
    assert golden.differences(FOLDER, [CASES_BY_ID[case]]) == []


@pytest.mark.parametrize("case", CASES_BY_ID.values(), ids=CASES_BY_ID)
def test_the_float64_spec_gives_what_the_decimals_say(case):
    """And the float32 spec does, within the tolerances in the file."""
    content = (FOLDER / f"{case.id}.safetensors").read_bytes()
    arrays = safetensors.numpy.load(content)
    with safetensors.safe_open(FOLDER / f"{case.id}.safetensors", "numpy") as file:
        description = json.loads(file.metadata()["golden"])
    assert description["version"] == spec.VERSION
    options = case.config.to_dict()
    assert description["config"] == {name: options[name] for name in description["config"]}
    assert description["config"].keys() >= {"channels", "qk_channels", "value_channels", "kv_pool"}
    for dtype, shrink in (("float32", 1.0), ("float64", 2.0**-29)):
        params = {
            name.removeprefix("params."): array.astype(dtype)
            for name, array in arrays.items()
            if name.startswith("params.")
        }
        x = arrays["input.x"].astype(dtype)
        if case.family == "forward":
            found = {"y": spec.forward(case.config, params, x)}
        elif case.family == "map":
            found = {"map": spec.attention_map(case.config, params, x)}
        elif case.family == "vjp":
            found = spec.vjp(case.config, params, x, arrays["input.dy"].astype(dtype))
        else:
            value, gradients = spec.r1(case.config, params, x, arrays["input.w"].astype(dtype))
            found = {"r1": np.array([value])} | gradients
        assert {f"want.{name}" for name in found} == {name for name in arrays if name.startswith("want.")}
        for name, value in found.items():
            want = arrays[f"want.{name}"]
            assert want.dtype == np.float64
            assert np.isfinite(want).all()
            error = float(np.abs(value - want).max(initial=0))
            tolerance = description["tolerances"][name]
            assert error <= shrink * min(4 * tolerance["floor"], tolerance["cap"]), name
            assert tolerance["floor"] < tolerance["cap"] or tolerance["floor"] == tolerance["cap"] == 0


def test_a_changed_function_is_refused_and_a_new_version_is_not(tmp_path, monkeypatch):
    few = [CASES_BY_ID["SA-FWD-009"], CASES_BY_ID["SA-MAP-009"]]
    monkeypatch.setattr(golden, "golden_cases", lambda: few)
    run = CliRunner().invoke
    assert run(golden.main, [str(tmp_path)]).output == "2 files written, 0 there already\n"
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert run(golden.main, [str(tmp_path)]).output == "0 files written, 2 there already\n"
    assert run(golden.main, [str(tmp_path), "--check"]).output == "2 files are there bit for bit\n"

    forward = spec.forward
    monkeypatch.setattr(spec, "forward", lambda config, params, x: forward(config, params, x) * 1)
    monkeypatch.setattr(spec, "forward", lambda config, params, x: x + (forward(config, params, x) - x) * 2)
    refused = run(golden.main, [str(tmp_path)])
    assert refused.exit_code == 2
    assert "SA-FWD-009.safetensors: what the spec gives is not what is there" in refused.output
    assert "raise VERSION" in refused.output
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    checked = run(golden.main, [str(tmp_path), "--check"])
    assert checked.exit_code == 1
    assert "SA-FWD-009.safetensors: want.y would be different" in checked.output

    monkeypatch.setattr(spec, "VERSION", spec.VERSION + 1)
    assert run(golden.main, [str(tmp_path)]).output == "2 files written, 0 there already\n"
    (tmp_path / "SA-MAP-009.safetensors").unlink()
    assert "SA-MAP-009.safetensors: is not there" in run(golden.main, [str(tmp_path), "--check"]).output


def test_one_bit_is_a_difference(tmp_path):
    case = CASES_BY_ID["SA-FWD-009"]
    arrays = safetensors.numpy.load(golden.vector(case))
    nudged = arrays | {"want.y": np.nextafter(arrays["want.y"], np.inf)}
    (tmp_path / f"{case.id}.safetensors").write_bytes(safetensors.numpy.save(nudged))
    assert golden.differences(tmp_path, [case]) == [f"{case.id}.safetensors: want.y would be different"]


def reader(folder: Path) -> subprocess.CompletedProcess[str]:
    # Isolated: neither the working folder nor PYTHONPATH can lend it this library.
    command = [sys.executable, "-I", str(ROOT / "examples" / "golden_reader.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_reader_that_has_none_of_our_code():
    source = (ROOT / "examples" / "golden_reader.py").read_text(encoding="utf-8")
    imported = set(re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE))
    assert imported == {"hashlib", "json", "sys", "pathlib", "numpy"}
    result = reader(FOLDER)
    assert result.returncode == 0, result.stdout + result.stderr
    count = sum(case.family in ("forward", "map") for case in CASES_BY_ID.values())
    assert result.stdout == f"{2 * count} comparisons, 0 failed\n"


def test_the_reader_notices_a_wrong_vector(tmp_path):
    name = "SA-FWD-006.safetensors"
    arrays = safetensors.numpy.load_file(FOLDER / name)
    with safetensors.safe_open(FOLDER / name, "numpy") as file:
        metadata = file.metadata()
    arrays["want.y"] = arrays["want.y"] + 1e-10
    content = safetensors.numpy.save(arrays, metadata)
    (tmp_path / name).write_bytes(content)
    (tmp_path / golden.SUMS).write_text(f"{hashlib.sha256(content).hexdigest()}  {name}\n", encoding="ascii")
    result = reader(tmp_path)
    assert result.returncode == 1
    assert "SA-FWD-006 (pooled with biases), float64: error 1e-10" in result.stdout
    (tmp_path / name).write_bytes(content[:-1] + b"\x00")
    assert f"{name}: is not the file that SHA256SUMS lists" in reader(tmp_path).stdout


def test_the_reader_says_in_a_line_that_there_are_no_vectors(tmp_path):
    command = [sys.executable, "-I", str(ROOT / "examples" / "golden_reader.py")]
    for arguments, named in (([], "golden-vectors"), ([str(tmp_path)], str(tmp_path))):
        result = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert result.returncode == 2
        assert result.stderr == f"{named}: has no SHA256SUMS; name the folder of the golden vectors\n"


def test_singles_are_float32():
    generator = np.random.Generator(np.random.PCG64(0))
    a, b = (generator.standard_normal(500).astype(np.float32) for _ in range(2))
    for one, other, single in (
        (a + b, a - b, (to_singles(a) + to_singles(b), to_singles(a) - to_singles(b))),
        (a * b, a / b, (to_singles(a) * to_singles(b), to_singles(a) / to_singles(b))),
    ):
        assert (to_floats(single[0]) == one).all()
        assert (to_floats(single[1]) == other).all()
    wide = np.exp(a.astype(np.float64)).astype(np.float32)
    assert (to_floats(np.exp(to_singles(a))) == wide).all()
    assert Single(1.0) == 1
    assert Single(1.0) != Single(2.0)
    assert float(Single(16777216.0) + 1) == 16777216.0


def test_decimals_do_not_depend_on_the_callers_context():
    case = CASES_BY_ID["SA-FWD-011"]
    with decimal.localcontext(decimal.Context(prec=5)):
        assert golden.differences(FOLDER, [case]) == []
    with fifty_digits():
        third = to_decimals(np.array([1.0])) / to_decimals(np.array([3.0]))
    assert str(third[0]) == "0." + 50 * "3"


def test_the_spec_refuses_objects_that_do_not_fit():
    case = next(case for case in CASES if case.id == "SA-FWD-001")
    x = to_decimals(np.ones((1, 2, 3, 24)))
    with pytest.raises(ValueError, match=r"missing: query.kernel"):
        spec.forward(case.config, {"gamma": to_decimals(np.ones(1))}, x)
