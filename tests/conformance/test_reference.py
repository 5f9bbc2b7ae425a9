"""The spec passes every case as a backend."""

from selfattn_core.conformance.cases.families import FAMILIES
from selfattn_core.conformance.cases.table import all_runs
from selfattn_core.conformance.execution.in_process import judge_in_process
from selfattn_core.conformance.reference import Reference


def test_the_spec_is_conformant_with_itself():
    outcomes = list(
        judge_in_process(Reference(), [run for run in all_runs() if run.layout == "channels_last"])
    )
    assert [outcome.message for outcome in outcomes if outcome.status != "pass"] == []
    assert all(outcome.ratio == 0 for outcome in outcomes if outcome.run.dtype == "float64")
    assert 0 < max(outcome.ratio for outcome in outcomes if outcome.run.dtype == "float32") <= 1
    assert 0 < max(outcome.ratio for outcome in outcomes if outcome.run.dtype == "float16") <= 1
    assert {outcome.run.case.family for outcome in outcomes} == set(FAMILIES) - {"memory"}
