"""The kit finds what is wrong with a backend and nothing wrong with a right one; the command says so."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from selfattn_core import spec
from selfattn_core.conformance.backend import REGISTRY, resolve
from selfattn_core.conformance.cases import CASES, DTYPES, FAMILIES, Inputs, _decided, inputs
from selfattn_core.conformance.report import as_json, as_table
from selfattn_core.conformance.runner import Run, all_runs, compare, run_backend
from selfattn_core.conformance.tolerance import FACTOR, expect, judge
from selfattn_core.conformance.worker import answers

HERE = Path(__file__).parent
FEW = [run for run in all_runs() if run.case.id.endswith(("-001", "-002")) and run.layout == "channels_last"]

# What is wrong with each backend of toy_backends, and the family that has to see it.
BROKEN = {
    "QueryKeyExchanged": "forward",
    "Scaled": "forward",
    "WithoutKeyBias": "params",
    "GammaDropped": "forward",
    "SoftmaxOverQueries": "map",
    "MapTransposed": "map",
    "PositionsTransposed": "forward",
    "ResidualDropped": "forward",
    "GradientWithoutRowSum": "vjp",
    "NoGradientOfGamma": "vjp",
    "FirstOrderPenalty": "r1",
    "LowPrecision": "forward",
    "WrongShape": "forward",
    "WrongDtype": "forward",
    "NotANumber": "forward",
    "WrongNames": "vjp",
}


@pytest.fixture
def on_path(monkeypatch):
    """As if toy_backends were a package somebody has installed."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])))
    monkeypatch.syspath_prepend(HERE)


def judged(name: str, runs):
    backend = resolve(f"toy_backends:{name}")
    for run in runs:
        given = inputs(run.case, run.dtype)
        yield compare(run, answers(backend, run.case, given, run.dtype, run.layout))


def test_ids_are_unique_and_every_family_is_there():
    assert len({case.id for case in CASES}) == len(CASES)
    assert {case.family for case in CASES} == set(FAMILIES)


def test_cases_are_frozen():
    """Ids, layers and sizes are what reports of different versions are compared by."""
    listing = "\n".join(
        f"{case.id} {case.family} {_options(case.config)} {case.shape} "
        f"gamma {case.gamma} logits {case.logits} {'constant ' if case.constant else ''}: {case.title}"
        for case in CASES
    )
    assert listing + "\n" == (HERE / "golden_cases.txt").read_text(encoding="utf-8")


def _options(config):
    """The values of a config; that of spectral_norm, an option younger than the first cases, only where it is True."""
    values = tuple(config.to_dict().values())
    return values if config.spectral_norm else values[:-1]


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.shape == (2, 5, 7)], ids=lambda case: case.id
)
def test_inputs_can_see_bugs(case):
    given = inputs(case, "float64")
    batch, height, width, channels = given.x.shape
    assert len({batch, height, width, channels, case.config.qk_channels}) >= 4
    assert all(array.any() for name, array in given.params.items() if name != "gamma" or case.gamma)
    if not case.constant:
        assert spec.attention_map(case.config, given.params, given.x).max() > 0.3
    again = inputs(case, "float64")
    assert given.x.tobytes() == again.x.tobytes()
    assert given.x.tobytes() != inputs(case, "float64", seed=1).x.tobytes()


def test_no_pooling_window_of_an_input_is_decided_by_rounding():
    """Two right backends would send its gradient to different positions."""
    case = next(case for case in CASES if case.config.kv_pool == 2 and case.shape == (2, 5, 7))
    clear = inputs(case, "float32")
    assert _decided(case, clear)
    near = clear.x.copy()
    near[1, 2, 3] = near[1, 2, 2] * np.float32(1 + 1e-6)
    tied = Inputs(clear.params, near, clear.dy)
    windows = (near @ clear.params["value.kernel"])[1, 2:4, 2:4].reshape(4, -1)
    assert set(windows.argmax(axis=0)) & {0, 1}, (
        "the two nearly equal positions should be the largest somewhere"
    )
    assert not _decided(case, tied)
    draws = iter([tied, clear])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selfattn_core.conformance.cases._draw", lambda *_: next(draws))
        assert inputs(case, "float32") is clear


def test_the_spec_is_conformant_with_itself(on_path):
    outcomes = list(judged("Good", [run for run in all_runs() if run.layout == "channels_last"]))
    assert [outcome.message for outcome in outcomes if outcome.status != "pass"] == []
    assert all(outcome.ratio == 0 for outcome in outcomes if outcome.run.dtype == "float64")
    assert 0 < max(outcome.ratio for outcome in outcomes if outcome.run.dtype == "float32") <= 1


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_backend_is_caught_by_its_family(on_path, name):
    family = BROKEN[name]
    outcomes = list(judged(name, [run for run in FEW if run.case.family == family]))
    assert any(outcome.status == "fail" for outcome in outcomes)
    assert all(outcome.message for outcome in outcomes if outcome.status == "fail")


def test_no_forward_case_can_see_the_key_bias(on_path):
    runs = [run for run in FEW if run.case.family in ("forward", "map")]
    assert {outcome.status for outcome in judged("WithoutKeyBias", runs)} == {"pass"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["forward", "vjp", "r1"])
def test_the_cap_holds_whatever_the_floor(family, dtype):
    """A spec that were as noisy as you like could not hide an error beyond the cap."""
    case = next(case for case in CASES if case.family == family)
    name, expectation = next(iter(expect(case, dtype).items()))
    noisy = dataclasses.replace(expectation, floor=np.inf)
    assert judge(name, (expectation.want + expectation.cap / 2).astype(dtype), noisy, dtype).passed
    verdict = judge(name, (expectation.want + 2 * expectation.cap).astype(dtype), noisy, dtype)
    assert "above the hard cap" in verdict.message
    beyond = judge(
        name, (expectation.want + 2 * FACTOR * expectation.floor).astype(dtype), expectation, dtype
    )
    assert "× the noise floor, at most 8 × is allowed" in beyond.message


def test_a_run_in_a_process_of_its_own(on_path):
    report = run_backend("toy_backends:Good", runs=FEW)
    assert report.passed
    assert report.versions == {"toy": "1"}
    assert len(report.outcomes) == len(FEW)
    assert "bit for bit" in as_table([report])


def test_what_it_prints_does_not_matter(on_path):
    assert run_backend("toy_backends:Talks", runs=FEW).passed


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Dies", "the process died by signal 11 in this case"),
        ("Leaves", "the process exited with code 9 in this case"),
        ("Hangs", "the process was ended after 3 s in this case"),
    ],
)
def test_a_crash_is_an_error_in_the_case_it_happened_in(on_path, name, words):
    report = run_backend(f"toy_backends:{name}", runs=FEW, timeout=3)
    by_family = {outcome.run.case.family: outcome for outcome in reversed(report.outcomes)}
    assert by_family["forward"].status == "pass"
    assert by_family["map"].status == "error"
    assert words in by_family["map"].message
    assert by_family["vjp"].status == "error"
    assert "not reached" in by_family["vjp"].message
    assert not report.passed


def test_an_exception_is_an_error_in_its_case_only(on_path):
    report = run_backend("toy_backends:Raises", runs=FEW)
    assert {outcome.status for outcome in report.outcomes if outcome.run.case.family == "forward"} == {
        "error"
    }
    assert {outcome.status for outcome in report.outcomes if outcome.run.case.family != "forward"} == {"pass"}
    assert "a bug in here" in as_table([report])


def test_what_is_not_claimed_is_listed_as_such(on_path):
    report = run_backend("toy_backends:InferenceOnly", runs=FEW)
    assert report.passed
    assert {o.run.case.family for o in report.outcomes if o.status == "unclaimed"} == set(FAMILIES) - {
        "forward"
    }
    assert as_table([report]).count("unclaimed") == len(FAMILIES) - 1


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("toy_backends:Lacking", "lacks attention_map"),
        ("toy_backends:Boastful", "claims telepathy; the abilities are"),
        ("toy_backends:Absent", "toy_backends has no 'Absent'"),
        ("no_such_module:Backend", "No module named 'no_such_module'"),
    ],
)
def test_a_backend_that_does_not_start(on_path, target, words):
    report = run_backend(target, runs=FEW)
    assert not report.passed
    assert words in report.error
    assert words in as_table([report])


def test_a_name_that_is_no_backend():
    with pytest.raises(ValueError, match="expected one of torch, keras-tensorflow"):
        run_backend("tensorfow")


def test_the_json_holds_every_verdict(on_path):
    report = run_backend("toy_backends:NotANumber", runs=FEW)
    content = json.loads(json.dumps(as_json([report], seed=0), allow_nan=False))
    (backend,) = content["backends"]
    assert backend["passed"] is False
    assert len(backend["outcomes"]) == len(FEW)
    forward = [outcome for outcome in backend["outcomes"] if outcome["family"] == "forward"]
    assert forward[0]["ratios"] == {"y": None}
    assert "NaN" in forward[0]["message"]


def selfattn(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from selfattn_core.cli import main; main(prog_name='selfattn')"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


def test_the_command_exits_by_what_it_found(on_path, tmp_path):
    good = selfattn("conform", "toy_backends:InferenceOnly", "--json", "-")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["backends"][0]["name"] == "toy_backends:InferenceOnly"
    assert "noise floor" in good.stderr
    bad = selfattn("conform", "toy_backends:NotANumber", "toy_backends:InferenceOnly")
    assert bad.returncode == 1
    assert "FAILED" in bad.stdout
    assert "toy_backends:InferenceOnly" in bad.stdout
    wrong = selfattn("conform", "tensorfow")
    assert wrong.returncode == 2
    assert "unknown backend tensorfow; known are torch" in wrong.stderr
    unwritable = selfattn(
        "conform", "toy_backends:InferenceOnly", "--json", str(tmp_path / "absent" / "r.json")
    )
    assert unwritable.returncode == 2
    assert "there is no folder" in unwritable.stderr
    assert "…" not in unwritable.stderr, "no backend is asked before that"
    assert "Traceback" not in unwritable.stderr


def test_a_missing_backend_exits_3_at_once(monkeypatch):
    missing = dataclasses.replace(REGISTRY["torch"], requires=("no_such_framework",))
    monkeypatch.setitem(REGISTRY, "torch", missing)
    report = run_backend("torch", runs=[Run(CASES[0], "float32", "channels_last")])
    assert report.missing == ("no_such_framework",)
    assert not report.passed
    assert "no_such_framework not installed: pip install 'selfattn[torch]'" in as_table([report])
