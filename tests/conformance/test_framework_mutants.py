"""Broken layers that need a framework to be broken are caught by the families that are there for them."""

from selfattn_core.conformance.runner import all_runs, run_backend


def test_a_gamma_that_is_no_parameter_of_torch():
    """As in the published f/g/h layer: its output is right, but it is neither trained nor saved."""
    asked = {"SA-FWD-001", "SA-SAV-001", "SA-VJP-001"}
    runs = [run for run in all_runs() if run.case.id in asked]
    report = run_backend("selfattn_torch.conformance:PlainGamma", runs=runs)
    status = {
        case: {outcome.status for outcome in report.outcomes if outcome.run.case.id == case} for case in asked
    }
    assert status["SA-FWD-001"] == {"pass"}
    assert "pass" not in status["SA-SAV-001"] | status["SA-VJP-001"]
    assert report.level is None
