"""No right implementation fails, and each differs from the definition."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from selfattn_core.conformance.cases.case import Run
from selfattn_core.conformance.cases.inputs import inputs
from selfattn_core.conformance.cases.table import CASES
from selfattn_core.conformance.execution.in_process import judge_in_process
from selfattn_core.conformance.mutants.sixteen_bits import InBfloat16
from selfattn_core.conformance.protocol import Claims, declined
from selfattn_core.conformance.questions.ask import answers
from selfattn_core.conformance.reference import Reference
from selfattn_core.conformance.release import calibrate
from selfattn_core.conformance.release import right as release
from selfattn_core.conformance.release.calibrate import RESULT, SEEDS
from selfattn_core.conformance.release.right import HOMES, implementations, measure, tried_runs
from selfattn_core.conformance.right import RightImplementation, edited
from selfattn_core.conformance.verdicts import compare, expected
from selfattn_core.conformance.verdicts.tolerance import FACTORS
from selfattn_core.spec import Layer

BY_ID = {case.id: case for case in CASES}
RIGHT = {right.name: right for home in HOMES for right in implementations(home)}
# Few keys, so that most terms cancel, and the forms of layers.
CANCELLING = ("SA-MIX-007", "SA-MIX-009", "SA-GAN-007", "SA-GAN-018", "SA-VJP-007", "SA-SPN-007")
NARROW = ("SA-DTY-013", "SA-DTY-015", "SA-DTY-017")
FORMS = ("SA-FWD-004", "SA-MAP-006", "SA-VJP-005", "SA-GAN-006", "SA-SPN-009", "SA-SPN-033")


def runs(ids):
    return [Run(BY_ID[id_], dtype, "channels_last") for id_ in ids for dtype in BY_ID[id_].dtypes]


def alarms(right, ids, seed):
    return [
        (outcome.run.id, outcome.message)
        for outcome in judge_in_process(right.make(), runs(ids), seed)
        if outcome.status not in ("pass", "unclaimed")
    ]


def test_there_are_many_and_each_says_why():
    assert len(RIGHT) == sum(len(implementations(home)) for home in HOMES) >= 25
    for right in RIGHT.values():
        assert right.why.endswith("."), right.name


@pytest.mark.parametrize("name", RIGHT)
def test_none_fails(name):
    """At seeds at which some failed before the floor knew the terms that cancel."""
    for seed in (1, 8, 40):
        assert alarms(RIGHT[name], CANCELLING, seed) == []
    assert alarms(RIGHT[name], NARROW, 8) == []
    assert alarms(RIGHT[name], FORMS, 2) == []


@pytest.mark.parametrize("name", RIGHT)
def test_each_computes_something_else(name):
    backend = RIGHT[name].make()
    claims = Claims.of(backend)
    differs = False
    for run in runs((*CANCELLING, *NARROW, *FORMS)):
        if not claims.covers(run) or declined(backend, run.case.config):
            continue
        given = inputs(run.case, run.dtype, 3)
        spec = InBfloat16() if run.dtype == "bfloat16" else Reference()
        mine, plain = (answers(each, run.case, given, run.dtype, run.layout) for each in (backend, spec))
        differs |= any(
            np.asarray(mine[quantity]).tobytes() != np.asarray(plain[quantity]).tobytes()
            for quantity in plain
        )
    assert differs


@pytest.mark.parametrize(
    ("name", "case", "dtype", "seed", "constant"),
    [
        ("unnormalised", "SA-MIX-009", "float32", 8, "DEVIATION"),
        ("log-sum-exp", "SA-MIX-007", "float32", 18, "DEVIATION"),
        ("exponentials rounded to 16 bits", "SA-DTY-017", "float16", 4, "NARROW_DEVIATION"),
    ],
)
def test_without_the_terms_that_cancel_right_ones_fail(name, case, dtype, seed, constant, monkeypatch):
    run = Run(BY_ID[case], dtype, "channels_last")
    (passes,) = judge_in_process(RIGHT[name].make(), [run], seed)
    assert passes.status == "pass"
    monkeypatch.setattr(expected, constant, 0.0)
    compare._expectations.cache_clear()
    (fails,) = judge_in_process(RIGHT[name].make(), [run], seed)
    compare._expectations.cache_clear()
    assert fails.status == "fail"
    assert fails.ratio > FACTORS[dtype]


def test_without_the_fused_layer_of_16_bits_a_right_one_fails(monkeypatch):
    name = "gradient of the map rounded, and D from the output, in bfloat16"
    run = Run(BY_ID["SA-DTY-015"], "bfloat16", "channels_last")
    (passes,) = judge_in_process(RIGHT[name].make(), [run], 8)
    assert passes.status == "pass"
    monkeypatch.setattr(expected, "NarrowFusedLayer", Layer)
    compare._expectations.cache_clear()
    (fails,) = judge_in_process(RIGHT[name].make(), [run], 8)
    compare._expectations.cache_clear()
    assert fails.status == "fail"


def test_a_wrong_one_is_an_alarm():
    wrong = edited(
        "wrong", "It is not.", ("self.dS = layer.A * (self.dA - self.D)", "self.dS = layer.A * self.dA")
    )
    told = []
    found = measure([wrong], [3], runs(("SA-VJP-005",)), tell=told.append)["wrong"]
    assert found["runs"] == len(runs(("SA-VJP-005",)))
    assert found["false_alarms"]
    assert told == [f"wrong: {alarm}" for alarm in found["false_alarms"]]
    assert found["worst"]["float32"]["floors"] > FACTORS["float32"]


def test_float64_and_values_are_tried_at_every_tenth_seed():
    usual, tenth = tried_runs(3), tried_runs(20)
    assert {run.dtype for run in usual} == {"float32", "float16", "bfloat16"}
    assert {run.case.order for run in usual} == {1, 2}
    assert set(usual) < set(tenth)
    assert {run.dtype for run in tenth if run.case.order == 0} > {"float32", "float64"}


def test_the_committed_measurement_has_all_of_them_and_no_alarm():
    kept = json.loads(RESULT.read_text(encoding="utf-8"))["right"]
    assert kept["implementations"].keys() == RIGHT.keys(), "make calibrate"
    for name, measured in kept["implementations"].items():
        assert measured["false_alarms"] == [], name
        assert measured["seeds"] == SEEDS, "make calibrate"
        for dtype, worst in measured["worst"].items():
            assert worst["floors"] <= FACTORS[dtype], name


def test_one_is_made_anew_each_time():
    right: RightImplementation = next(iter(RIGHT.values()))
    assert right.make() is not right.make()
    assert right.make().name == right.name


def test_results_of_one_home_leave_all_others(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "RESULT", tmp_path / "calibration.json")
    calibrate._keep("torch", {"runs": 1})
    release._keep("one", {"a": {"runs": 2}, "b": {"runs": 3}})
    release._keep("other", {"c": {"runs": 4}})
    release._keep("one", {"b": {"runs": 5}})
    calibrate._keep("flax-nnx", {"runs": 6})
    kept = calibrate.kept_results()
    assert {name: each["runs"] for name, each in kept["backends"].items()} == {"torch": 1, "flax-nnx": 6}
    assert {name: each["runs"] for name, each in kept["right"]["implementations"].items()} == {"b": 5, "c": 4}
    assert {name: kept[name] for name in calibrate.policy()} == calibrate.policy()


def test_the_page_lists_each():
    place = importlib.util.spec_from_file_location("hooks", Path(__file__).parents[3] / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(place)
    place.loader.exec_module(hooks)
    page = hooks.right_implementations()
    for right in RIGHT.values():
        assert f"| {right.name} | {right.why} |" in page
