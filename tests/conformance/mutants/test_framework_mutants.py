"""The families catch broken layers that only exist in a framework."""

import pytest

from selfattn_core.conformance.cases.table import all_runs
from selfattn_core.conformance.execution.runner import run_backend

KERAS = "selfattn_keras.conformance.mutants"


def statuses(target, cases):
    """The outcomes of the claimed cases, by case, and the report."""
    report = run_backend(target, runs=[run for run in all_runs() if run.case.id in cases])
    assert not report.error
    return report, {
        case: {outcome.status for outcome in report.outcomes if outcome.run.case.id == case} - {"unclaimed"}
        for case in cases
    }


def test_a_gamma_that_is_no_parameter_of_torch():
    """As in the published f/g/h layer. The output is right, but gamma is not trained and not saved."""
    report, status = statuses(
        "selfattn_torch.conformance.mutants:PlainGamma", {"SA-FWD-001", "SA-SAV-001", "SA-VJP-001"}
    )
    assert status["SA-FWD-001"] == {"pass"}
    for case in ("SA-SAV-001", "SA-VJP-001"):
        assert status[case]
        assert status[case] <= {"fail", "error"}
    assert report.level is None


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["tensorflow", "torch"])
def test_a_gamma_that_is_no_variable_of_keras(framework, monkeypatch):
    """As in copies written for Keras 2, where a `tf.Variable` was enough."""
    monkeypatch.setenv("KERAS_BACKEND", framework)
    report, status = statuses(f"{KERAS}:GammaUntracked", {"SA-FWD-001", "SA-SAV-001"})
    assert status == {"SA-FWD-001": {"pass"}, "SA-SAV-001": {"error"}}
    assert "expected 1 variables, but received 0" in report.outcomes[-1].message


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["tensorflow", "jax"])
def test_a_projection_that_is_created_in_every_call(framework, monkeypatch):
    """As in copies of DANet, where every answer is different."""
    monkeypatch.setenv("KERAS_BACKEND", framework)
    _, status = statuses(f"{KERAS}:ProjectsAnew", {"SA-MAP-001", "SA-FWD-001", "SA-DET-001"})
    assert status["SA-MAP-001"] == {"pass"}
    assert status["SA-FWD-001"] == {"fail"}
    assert status["SA-DET-001"]
    assert status["SA-DET-001"] <= {"fail", "error"}


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "framework"), [("keras", "jax"), ("keras", "torch"), ("flax", "jax")])
def test_a_state_that_moves_in_evaluation(adapter, framework, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", framework)
    mutant = f"selfattn_{adapter}.conformance.mutants:MovesInEvaluation"
    _, status = statuses(mutant, {"SA-SPN-003", "SA-SPN-008", "SA-SPN-010"})
    assert status["SA-SPN-003"] == {"pass"}
    assert status["SA-SPN-008"] == status["SA-SPN-010"] == {"fail"}
