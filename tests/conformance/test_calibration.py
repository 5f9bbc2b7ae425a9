"""The limits are calibrated on correct backends. The measurements are committed, and contain no false alarm."""

import json
from pathlib import Path

import numpy as np

from selfattn_core.conformance import REGISTRY
from selfattn_core.conformance.reference import Reference
from selfattn_core.conformance.release.calibrate import (
    ADDED_SEEDS,
    RESULT,
    SEEDS,
    TRAJECTORY_TURNS,
    added_runs,
    measure,
    names_of,
    policy,
)
from selfattn_core.conformance.verdicts.tolerance import FACTORS


def test_the_committed_calibration_has_no_false_alarm():
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    kept = {name: found[name] for name in policy()}
    assert kept == policy(), "the limits have changed since they were tried: make calibrate"
    assert list(found["backends"]) == list(REGISTRY)
    trajectories = [name for name in found["asked"] if name.startswith("SA-TRN")]
    asked = SEEDS * (len(found["asked"]) - len(trajectories)) + SEEDS // TRAJECTORY_TURNS * len(trajectories)
    added, remedy = names_of(added_runs()), "python -m selfattn_core.conformance.release.calibrate --added"
    later = found.get("added", {})
    assert list(later) == (list(REGISTRY) if added else []), remedy
    for measured, seeds, runs in (
        *((each, SEEDS, asked) for each in found["backends"].values()),
        *((each, ADDED_SEEDS, ADDED_SEEDS * len(added)) for each in later.values()),
    ):
        assert measured["seeds"] == seeds
        assert measured["runs"] == runs, f"there are other cases than those that were calibrated: {remedy}"
        assert measured["false_alarms"] == []
        for key, worst in measured["worst"].items():
            assert worst["floors"] <= FACTORS[key.partition("/")[2]]


def test_the_page_says_what_was_measured():
    page = (Path(__file__).parents[2] / "docs" / "tolerances.md").read_text(encoding="utf-8")
    measured = json.loads(RESULT.read_text(encoding="utf-8"))["backends"].values()
    worst = max(each["floors"] for found in measured for each in found["worst"].values())
    (runs,) = {found["runs"] for found in measured}
    assert f"Each of our six backends answered {runs:,} runs" in page
    added = len(names_of(added_runs()))
    assert f"{added} runs were added since, and answered with {ADDED_SEEDS} inputs each" in page
    assert f"The worst error was {worst:.1f} floors" in page
    assert (
        f"The limits are {FACTORS['float32']:g} in float32 and float64, and {FACTORS['float16']:g} in 16 bits"
        in page
    )


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
    assert {alarm[:6] for alarm in wrong["false_alarms"]} == {"SA-MAP", "SA-SPN", "SA-DTY"}
    assert wrong["worst"]["map/float64"]["floors"] > FACTORS["float64"]
