"""The golden vectors are correct, complete, reproducible bit for bit, current, and readable without this library."""

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
from selfattn_core.conformance.cases.inputs import Inputs, inputs
from selfattn_core.conformance.cases.table import CASES
from selfattn_core.conformance.questions.ask import answers
from selfattn_core.conformance.reference import Reference
from selfattn_core.conformance.release import golden
from selfattn_core.conformance.release.decimals import (
    Single,
    fifty_digits,
    to_decimals,
    to_floats,
    to_singles,
)
from selfattn_core.conformance.verdicts.cancellation import terms_through_the_map
from selfattn_core.conformance.verdicts.expected import expect
from selfattn_core.conformance.verdicts.tolerance import FACTOR

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "golden-vectors"
CASES_BY_ID = {case.id: case for case in golden.golden_cases()}
# One case of each computation, and of each kind of config: flat, pooled, with and without an out projection.
SOME = [
    *("SA-FWD-002", "SA-MAP-007", "SA-VJP-016", "SA-GAN-009", "SA-VJP-010", "SA-FWD-013", "SA-GAN-014"),
    *("SA-MIX-007", "SA-MIX-009", "SA-SPN-005", "SA-SPN-006", "SA-SPN-007", "SA-SPN-009", "SA-SPN-012"),
]
COMPUTATIONS = {"forward", "map", "vjp", "r1", "mixed", "training_pass", "training_vjp"}


def listed() -> dict[str, str]:
    lines = (FOLDER / golden.SUMS).read_text(encoding="ascii").splitlines()
    return {name: digest for digest, name in (line.split("  ") for line in lines)}


def test_every_case_has_a_file_and_every_file_its_sum():
    assert set(listed()) == {f"{case}.safetensors" for case in CASES_BY_ID}
    assert {path.name for path in FOLDER.iterdir()} == {*listed(), golden.SUMS}
    for name, digest in listed().items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest, name
    families = {case.family for case in CASES_BY_ID.values()}
    assert families == {"forward", "map", "vjp", "r1", "mixed", "spectral_norm"}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 3_700_000


def frozen(name: str) -> dict[str, str]:
    lines = (Path(__file__).parent / name).read_text(encoding="ascii").splitlines()
    return {name: digest for digest, name in (line.split("  ") for line in lines)}


def test_files_of_this_edition_are_frozen():
    """To change a file, raise EDITION, freeze the new sums as a new list, and list the changes in the changelog.

    A new case needs no other edition: its line is added to the list.
    """
    sums = frozen(f"golden_vectors.{spec.VERSION}.{golden.EDITION}.sha256")
    changed = [name for name, digest in sums.items() if listed().get(name) != digest]
    assert changed == [], "raise EDITION in selfattn_core/conformance/release/golden.py"
    assert sums.keys() == listed().keys(), "freeze the files of new cases: add their lines of SHA256SUMS"


def test_arrays_of_this_version_are_frozen():
    """Other inputs or expected values mean another function. Raise spec.VERSION, and freeze the new sums as a new list.

    The arrays are what follows the header, so that another description leaves these sums as they are.
    """

    def of_arrays(name: str) -> str:
        content = (FOLDER / name).read_bytes()
        return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()

    sums = frozen(f"golden_arrays.{spec.VERSION}.sha256")
    changed = [name for name, digest in sums.items() if name not in listed() or of_arrays(name) != digest]
    assert changed == [], "raise VERSION in selfattn_core/spec.py"
    missing = [f"{of_arrays(name)}  {name}" for name in listed() if name not in sums]
    assert missing == [], "freeze the arrays of new cases: add these lines"


@pytest.mark.parametrize("case", SOME)
def test_files_are_reproduced_bit_for_bit(case):
    assert golden.differences(FOLDER, [CASES_BY_ID[case]]) == []


@pytest.mark.parametrize("case", CASES_BY_ID.values(), ids=CASES_BY_ID)
def test_the_float64_spec_gives_what_the_decimals_say(case):
    """The float32 spec also passes, within the tolerances in the file."""
    content = (FOLDER / f"{case.id}.safetensors").read_bytes()
    arrays = safetensors.numpy.load(content)
    with safetensors.safe_open(FOLDER / f"{case.id}.safetensors", "numpy") as file:
        description = json.loads(file.metadata()["golden"])
    assert description["version"] == spec.VERSION
    options = case.config.to_dict()
    assert description["config"] == {name: options[name] for name in description["config"]}
    assert description["config"].keys() >= {"channels", "qk_channels", "value_channels", "kv_pool"}
    assert description["edition"] == golden.EDITION
    assert description["computation"] in COMPUTATIONS
    groups = {
        prefix: {
            name.removeprefix(f"{prefix}."): array
            for name, array in arrays.items()
            if name.startswith(f"{prefix}.")
        }
        for prefix in ("input", "params", "cotangents", "want")
    }
    assert sum(map(len, groups.values())) == len(arrays)
    maps = groups["input"]
    assert maps.keys() <= {"x", "dy", "w"}
    for dtype, shrink in (("float32", 1.0), ("float64", 2.0**-29)):
        params, cotangents = (
            {name: array.astype(dtype) for name, array in groups[group].items()}
            for group in ("params", "cotangents")
        )
        x, dy = (
            array.astype(dtype)
            for array in (maps["x"], maps.get("dy", maps.get("w", np.zeros_like(maps["x"]))))
        )
        given = Inputs(params, x, dy, cotangents=cotangents)
        found = answers(Reference(), case, given, dtype, "channels_last")
        assert found.keys() == groups["want"].keys() == description["tolerances"].keys()
        for name, value in found.items():
            want = groups["want"][name]
            assert want.dtype == np.float64
            assert np.isfinite(want).all()
            error = float(np.abs(value - want).max(initial=0))
            tolerance = description["tolerances"][name]
            assert error <= shrink * min(4 * tolerance["floor"], tolerance["cap"]), name
            assert tolerance["floor"] < tolerance["cap"] or tolerance["floor"] == tolerance["cap"] == 0


@pytest.mark.parametrize("case", CASES_BY_ID.values(), ids=CASES_BY_ID)
def test_the_tolerances_are_those_of_the_kit(case):
    """Compares the floor without the error of the spec, because the kit measures that error on this machine."""
    with safetensors.safe_open(FOLDER / f"{case.id}.safetensors", "numpy") as file:
        description = json.loads(file.metadata()["golden"])
    assert description["factor"] == FACTOR
    for name, expectation in expect(case, "float32").items():
        tolerance = description["tolerances"][name]
        assert tolerance["cap"] == pytest.approx(expectation.cap, rel=1e-9, abs=0), name
        assert expectation.floor / 3 <= tolerance["floor"] <= 3 * expectation.floor, name


@pytest.mark.parametrize("case", ["SA-VJP-009", "SA-VJP-014", "SA-GAN-009", "SA-GAN-014"])
def test_what_vanishes_has_the_ulp_of_its_terms(case):
    content = (FOLDER / f"{case}.safetensors").read_bytes()
    arrays = safetensors.numpy.load(content)
    with safetensors.safe_open(FOLDER / f"{case}.safetensors", "numpy") as file:
        tolerances = json.loads(file.metadata()["golden"])["tolerances"]
    assert not arrays["want.query.kernel"].any()
    assert 0 < tolerances["query.kernel"]["floor"] < tolerances["query.kernel"]["cap"]


@pytest.mark.parametrize("order", [1, 2])
def test_terms_that_vanish_are_the_same_in_every_arithmetic(order):
    """First and second derivatives in decimals, to the last bit of float64, with and without spectral norm."""
    for case in (CASES_BY_ID[name] for name in ("SA-VJP-014", "SA-MIX-006", "SA-SPN-007", "SA-MIX-009")):
        sums = []
        for number in (to_decimals, to_singles, None):
            with fifty_digits():
                given = inputs(case, "float32")
                convert = number or (lambda array: array.astype(np.float64))
                sums.append(
                    terms_through_the_map(
                        case.config,
                        {name: convert(array) for name, array in given.params.items()},
                        convert(given.x),
                        convert(given.dy),
                        cotangents={name: convert(array) for name, array in given.cotangents.items()} or None,
                        order=order,
                    )
                )
        decimals, singles, floats = sums
        assert decimals == pytest.approx(floats, rel=1e-12, abs=0)
        assert singles == pytest.approx(floats, rel=1e-4, abs=0)


@pytest.mark.parametrize("case", [name for name in CASES_BY_ID if name.startswith("SA-SPN")])
def test_no_machine_draws_another_state(case):
    """It is computed in float64. Its last bits depend on the BLAS, but no rounding to float32 depends on them."""
    drawn, rounded = (inputs(CASES_BY_ID[case], dtype).params for dtype in ("float64", "float32"))
    state = [name for name in drawn if name.endswith((".u", ".v"))]
    assert len(state) >= 6
    for name in state:
        for nudge in (1 - 1e-12, 1 + 1e-12):
            assert ((drawn[name] * nudge).astype(np.float32) == rounded[name]).all(), name


def test_a_changed_function_is_refused_and_a_new_version_is_not(tmp_path, monkeypatch):
    few = [CASES_BY_ID["SA-FWD-009"], CASES_BY_ID["SA-MAP-009"]]
    monkeypatch.setattr(golden, "golden_cases", lambda: few)
    run = CliRunner().invoke
    assert run(golden.main, [str(tmp_path)]).output == "2 files written, 0 there already\n"
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert run(golden.main, [str(tmp_path)]).output == "0 files written, 2 there already\n"
    assert run(golden.main, [str(tmp_path), "--check"]).output == "2 files are there bit for bit\n"

    forward = spec.forward
    monkeypatch.setattr(spec, "forward", lambda config, params, x: x + (forward(config, params, x) - x) * 2)
    # A new edition must not hide a changed function.
    for edition in (golden.EDITION, golden.EDITION + 1):
        monkeypatch.setattr(golden, "EDITION", edition)
        refused = run(golden.main, [str(tmp_path)])
        assert refused.exit_code == 2
        assert "SA-FWD-009.safetensors: want.y would be different" in refused.output
        assert "raise VERSION" in refused.output
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    checked = run(golden.main, [str(tmp_path), "--check"])
    assert checked.exit_code == 1
    assert "SA-FWD-009.safetensors: want.y would be different" in checked.output

    monkeypatch.setattr(spec, "VERSION", spec.VERSION + 1)
    assert run(golden.main, [str(tmp_path)]).output == "2 files written, 0 there already\n"
    (tmp_path / "SA-MAP-009.safetensors").unlink()
    assert "SA-MAP-009.safetensors: is not there" in run(golden.main, [str(tmp_path), "--check"]).output


def test_changed_tolerances_are_refused_and_a_new_edition_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(golden, "golden_cases", lambda: [CASES_BY_ID["SA-FWD-009"]])
    run = CliRunner().invoke
    assert run(golden.main, [str(tmp_path)]).exit_code == 0
    before = (tmp_path / "SA-FWD-009.safetensors").read_bytes()
    monkeypatch.setattr(golden, "FACTOR", 4.0)
    refused = run(golden.main, [str(tmp_path)])
    assert refused.exit_code == 2
    assert "SA-FWD-009.safetensors: the description would be different" in refused.output
    assert "raise EDITION" in refused.output
    assert (tmp_path / "SA-FWD-009.safetensors").read_bytes() == before
    monkeypatch.setattr(golden, "EDITION", golden.EDITION + 1)
    assert run(golden.main, [str(tmp_path)]).output == "1 files written, 0 there already\n"


def test_files_of_the_first_edition_did_not_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(golden, "golden_cases", lambda: [CASES_BY_ID["SA-FWD-009"]])
    path = tmp_path / "SA-FWD-009.safetensors"
    content = golden.vector(CASES_BY_ID["SA-FWD-009"])
    first = {"golden": json.dumps({"version": spec.VERSION})}
    path.write_bytes(safetensors.numpy.save(safetensors.numpy.load(content), first))
    assert golden.write(tmp_path) == [path.name]
    assert path.read_bytes() == content


def test_a_file_that_cannot_be_read_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(golden, "golden_cases", lambda: [CASES_BY_ID["SA-FWD-009"]])
    for content in (
        b"",
        b"not a file of tensors",
        safetensors.numpy.save({"a": np.zeros(1)}, {"golden": "{}"}),
    ):
        (tmp_path / "SA-FWD-009.safetensors").write_bytes(content)
        refused = CliRunner().invoke(golden.main, [str(tmp_path)])
        assert refused.exit_code == 2
        assert "SA-FWD-009.safetensors: cannot be read" in refused.output
        assert (tmp_path / "SA-FWD-009.safetensors").read_bytes() == content


def test_one_bit_is_a_difference(tmp_path):
    case = CASES_BY_ID["SA-FWD-009"]
    arrays = safetensors.numpy.load(golden.vector(case))
    nudged = arrays | {"want.y": np.nextafter(arrays["want.y"], np.inf)}
    (tmp_path / f"{case.id}.safetensors").write_bytes(safetensors.numpy.save(nudged))
    assert golden.differences(tmp_path, [case]) == [f"{case.id}.safetensors: want.y would be different"]


READER = ROOT / "examples" / "golden_reader.py"
# Text in the source of the reader, and a bug that replaces it.
BUGS = {
    "nothing is subtracted in the softmax's gradient": (
        ".swapaxes(1, 2) - subtracted)",
        ".swapaxes(1, 2))",
        {"SA-VJP-001", "SA-VJP-009", "SA-VJP-014", "SA-GAN-009", "SA-GAN-014", "SA-MIX-009", "SA-SPN-012"},
        {"SA-FWD-001", "SA-MAP-001", "SA-SPN-003"},
    ),
    "the query's gradient is a ten-thousandth too large": (
        '"query": to_scores @ self.k,',
        '"query": to_scores @ self.k * 1.0001,',
        {"SA-VJP-001", "SA-GAN-001", "SA-MIX-001", "SA-SPN-001", "SA-SPN-011"},
        {"SA-FWD-001"},
    ),
    "the cotangent of gamma is not there": (
        "cotangents.get(name,",
        'cotangents.get(name + "!" * (name == "gamma"),',
        {"SA-MIX-001", "SA-MIX-009", "SA-MIX-011", "SA-SPN-007"},
        {"SA-GAN-001", "SA-VJP-001", "SA-SPN-006"},
    ),
    "the norm is a constant to the gradients": (
        "along * direction",
        "0 * along * direction",
        {"SA-SPN-001", "SA-SPN-005", "SA-SPN-006", "SA-SPN-007", "SA-SPN-012"},
        {"SA-SPN-002", "SA-SPN-003", "SA-SPN-004", "SA-VJP-001"},
    ),
    "a pass in training leaves the state": (
        'if computation in ("training_pass", "training_vjp"):',
        "if False:",
        {"SA-SPN-002", "SA-SPN-009", "SA-SPN-011", "SA-SPN-012"},
        {"SA-SPN-001", "SA-SPN-003"},
    ),
    "the last of equal values wins": (
        "first = rows[:, self.windows].real.argmax(axis=2)",
        "first = self.windows.shape[1] - 1 - rows[:, self.windows[:, ::-1]].real.argmax(axis=2)",
        {"SA-VJP-026"},
        {"SA-FWD-002", "SA-VJP-006"},
    ),
}


def reader(folder: Path, program: Path = READER) -> subprocess.CompletedProcess[str]:
    # Isolated mode, so that it cannot import this library from the working folder or PYTHONPATH.
    command = [sys.executable, "-I", str(program), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_reader_that_has_none_of_our_code():
    """Its layer subtracts rowsum(G∘o), not rowsum(A∘dA), and computes second derivatives by complex steps."""
    source = READER.read_text(encoding="utf-8")
    imported = set(re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE))
    assert imported == {"hashlib", "json", "sys", "pathlib", "numpy"}
    result = reader(FOLDER)
    assert result.returncode == 0, result.stdout + result.stderr
    count = 0
    for name in listed():
        with safetensors.safe_open(FOLDER / name, "numpy") as file:
            count += sum(key.startswith("want.") for key in file.keys())  # noqa: SIM118 - no dict
    assert result.stdout == f"{2 * count} comparisons, 0 failed; 0 computations were not answered\n"


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_in_the_readers_layer_is_seen_where_it_is(tmp_path, bug):
    right, wrong, seen, unseen = BUGS[bug]
    source = READER.read_text(encoding="utf-8")
    assert source.count(right) == 1
    (tmp_path / "reader.py").write_text(source.replace(right, wrong), encoding="utf-8")
    result = reader(FOLDER, tmp_path / "reader.py")
    assert result.returncode == 1, result.stderr
    failed = {line.partition(" ")[0] for line in result.stdout.splitlines()[:-1]}
    assert seen <= failed
    assert not unseen & failed


def test_the_reader_counts_what_it_does_not_answer(tmp_path):
    source = READER.read_text(encoding="utf-8").replace('elif computation == "mixed":', "elif False:")
    (tmp_path / "reader.py").write_text(source, encoding="utf-8")
    result = reader(FOLDER, tmp_path / "reader.py")
    assert result.returncode == 0
    mixed = sum("mixed" in (case.family, case.of) for case in CASES_BY_ID.values())
    assert f" 0 failed; {2 * mixed} computations were not answered" in result.stdout


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
    assert "SA-FWD-006 (pooled with biases), float64: y: error 1e-10" in result.stdout
    (tmp_path / name).write_bytes(content[:-1] + b"\x00")
    assert f"{name}: is not the file that SHA256SUMS lists" in reader(tmp_path).stdout


def test_the_reader_says_in_a_line_that_there_are_no_vectors(tmp_path):
    command = [sys.executable, "-I", str(READER)]
    for arguments, named in (([], "golden-vectors"), ([str(tmp_path)], str(tmp_path))):
        result = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert result.returncode == 2
        assert result.stderr == f"{named}: has no SHA256SUMS; name the folder of the golden vectors\n"


def test_the_page_describes_what_is_in_the_files():
    page = (ROOT / "docs" / "golden-vectors.md").read_text(encoding="utf-8")
    described = set(re.findall(r"`([\w.]+)`", page))
    for name in listed():
        with safetensors.safe_open(FOLDER / name, "numpy") as file:
            description = json.loads(file.metadata()["golden"])
            groups = {key.partition(".")[0] for key in file.keys() if key.count(".") > 1}  # noqa: SIM118 - no dict
            direct = {key for key in file.keys() if key.count(".") == 1}  # noqa: SIM118 - no dict
        assert description.keys() | description["config"].keys() <= described
        assert description["computation"] in described
        assert {f"{group}.query.kernel" for group in groups} <= described
        assert direct - {"cotangents.gamma", "want.gamma"} <= described
    assert f"golden_vectors.{spec.VERSION}.{golden.EDITION}.sha256" in page
    assert f"golden_arrays.{spec.VERSION}.sha256" in page


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
    assert (to_floats(np.sqrt(abs(to_singles(a)))) == np.sqrt(abs(a))).all()
    assert (to_floats(0 - to_singles(a)) == -a).all()
    assert ((to_singles(a) > 0.1) == (a > 0.1)).all()
    assert (to_floats(Single(3.0) * to_singles(a)) == 3 * a).all()
    with pytest.raises(TypeError):
        Single(1.0) + "1"
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
