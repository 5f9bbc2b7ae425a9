"""Outcomes, and the level that a backend reaches with them."""

import pytest

from selfattn_core.conformance.cases.table import CASES, all_runs
from selfattn_core.conformance.execution.runner import run_backend
from selfattn_core.conformance.report import as_data, as_table
from selfattn_core.conformance.results import BackendReport, Outcome
from tests.conformance.runs import ASKED, FEW


def test_what_is_not_claimed_is_listed_as_such(on_path):
    report = run_backend("toy_backends:InferenceOnly", runs=FEW)
    assert report.passed
    unclaimed = {o.run.case.family for o in report.outcomes if o.status == "unclaimed"}
    assert unclaimed == set(ASKED) - {"forward"}
    assert as_table(as_data([report])).count("unclaimed") == len(ASKED) - 1


def test_levels_are_reached_by_what_is_claimed_and_passed(on_path):
    core = all_runs(level="core")
    forward_only = run_backend("toy_backends:InferenceOnly", runs=core)
    assert forward_only.passed
    assert forward_only.level is None
    whole = run_backend("toy_backends:Core", runs=all_runs(level="training"))
    assert whole.passed
    assert whole.level == "core"
    assert not whole.conformant("training")
    # One dtype and one layout are enough, as the docstring of `conformant` explains.
    assert run_backend("toy_backends:SinglePrecision", runs=core).level == "core"
    # A level whose cases did not run is not reached.
    assert run_backend("toy_backends:Core", runs=core[:8]).level is None
    spoilt = run_backend("toy_backends:NotANumber", runs=core)
    assert spoilt.level is None


def in_16_bits(status, *dtypes):
    """A report of a backend with these dtypes. All claimed runs passed, except those in one dtype."""

    def outcome(run):
        if run.dtype not in dtypes:
            return Outcome(run, "unclaimed")
        return Outcome(run, status.get(run.dtype, "pass"))

    return BackendReport("any", dtypes=dtypes, outcomes=tuple(map(outcome, all_runs())))


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_one_dtype_of_16_bits_is_enough_to_deploy(half):
    """Some cases exist only in float16, so a backend with bfloat16 cannot run them."""
    assert {case.dtypes for case in CASES if case.family == "dtype"} >= {("float16",)}
    report = in_16_bits({}, "float32", "float64", half)
    assert report.level == "deploy"
    assert in_16_bits({}, "float32", half).level == "deploy"
    assert in_16_bits({half: "fail"}, "float32", "float64", half).level == "gan"
    both = in_16_bits({half: "error"}, "float32", "float64", "float16", "bfloat16")
    assert both.level == "gan"


def test_without_16_bits_nothing_is_deployed():
    report = in_16_bits({}, "float32", "float64")
    assert report.passed
    assert report.level == "gan"
    declined = in_16_bits({"bfloat16": "unclaimed"}, "float32", "float64", "bfloat16")
    assert declined.level == "gan"


def test_memory_that_cannot_be_measured_is_unclaimed_and_never_a_pass(on_path):
    runs = [run for run in all_runs() if run.case.family == "memory"]
    assert {o.status for o in run_backend("toy_backends:Frugal", runs=runs[:1]).outcomes} == {"pass"}
    (wrong,) = run_backend("toy_backends:FrugalWithKeys", runs=runs[:1]).outcomes
    assert wrong.status == "fail"
    assert wrong.message.startswith("y: error ")
    report = run_backend("toy_backends:NeverForgets", runs=[*runs, FEW[0]])
    assert {(o.run.case.family, o.status) for o in report.outcomes} == {
        ("memory", "unclaimed"),
        (FEW[0].case.family, "pass"),
    }
    reasons = {outcome.message for outcome in report.outcomes if outcome.run.case.id == runs[0].case.id}
    assert len(reasons) == 1
    assert "memory cannot be measured here: the peak of the process cannot be reset" in reasons.pop()
    everything = (*in_16_bits({}, "float32", "float16").outcomes, *report.outcomes)
    lacking = [o for o in everything if o.run.case.family != "memory" or o.status != "pass"]
    assert BackendReport("any", dtypes=("float32", "float16"), outcomes=tuple(lacking)).level == "gan"
