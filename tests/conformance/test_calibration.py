"""The limits have been tried on right backends: what was measured is committed, and was no false alarm."""

import json

import numpy as np

from selfattn_core.conformance import REGISTRY
from selfattn_core.conformance.calibrate import RESULT, SEEDS, TRAJECTORY_TURNS, calibrated_runs, measure
from selfattn_core.conformance.reference import Reference
from selfattn_core.conformance.tolerance import FACTORS


def test_the_committed_calibration_has_no_false_alarm():
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    assert found["limits"] == FACTORS, "the limits have changed since they were tried: make calibrate"
    assert list(found["backends"]) == list(REGISTRY)
    trajectories = [run for run in calibrated_runs() if run.case.family == "trajectory"]
    asked = SEEDS * (len(calibrated_runs()) - len(trajectories)) + SEEDS // TRAJECTORY_TURNS * len(
        trajectories
    )
    for measured in found["backends"].values():
        assert measured["seeds"] == SEEDS == 200
        assert measured["runs"] == asked, (
            "there are other cases than those that were calibrated: make calibrate"
        )
        assert measured["false_alarms"] == []
        for key, worst in measured["worst"].items():
            assert worst["floors"] <= FACTORS[key.partition("/")[2]]


def test_the_measurement_sees_an_alarm_and_the_worst():
    class Wrong(Reference):
        def attention_map(self, model, x):
            attention = super().attention_map(model, x)
            return attention * attention.dtype.type(1.01)

    with np.errstate(all="ignore"):  # NaN is what some cases are about
        right, wrong = measure(Reference(), 2), measure(Wrong(), 2)
    assert right["false_alarms"] == []
    assert right["worst"]["forward/float32"]["floors"] <= 1
    assert wrong["false_alarms"]
    assert {alarm[:6] for alarm in wrong["false_alarms"]} == {"SA-MAP", "SA-SPN"}
    assert wrong["worst"]["map/float64"]["floors"] > FACTORS["float64"]
