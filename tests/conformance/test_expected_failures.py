"""Expected failures of a backend."""

from selfattn_core.conformance.execution.runner import run_backend
from tests.conformance.runs import FEW


def test_an_expected_failure_is_told_apart(on_path):
    report = run_backend("toy_backends:KnownFailure", runs=FEW)
    known = [outcome for outcome in report.outcomes if outcome.run.case.id == "SA-FWD-001"]
    assert {outcome.status for outcome in known} == {"expected-failure"}
    assert {(outcome.reason, outcome.link) for outcome in known} == {
        ("it divides by zero", "https://example.org/1")
    }
    others = [o for o in report.outcomes if o.run.case.id == "SA-FWD-002"]
    assert {outcome.status for outcome in others} == {"fail"}
    only = run_backend("toy_backends:KnownFailure", runs=[run for run in FEW if run.case.id != "SA-FWD-002"])
    assert only.passed
    assert not only.conformant("core")


def test_a_crash_is_never_the_expected_failure(on_path):
    report = run_backend("toy_backends:KnownCrash", runs=[r for r in FEW if r.case.id == "SA-MAP-001"])
    assert {outcome.status for outcome in report.outcomes} == {"error"}
    assert not report.passed


def test_a_failure_that_is_no_more_is_a_failure(on_path):
    report = run_backend("toy_backends:StaleFailure", runs=FEW)
    bad = [outcome for outcome in report.outcomes if outcome.status != "pass"]
    assert [outcome.run.id for outcome in bad] == ["SA-FWD-001/float64/channels_last"]
    assert "remove SA-FWD-001/float64 from expected_failures" in bad[0].message
