"""The PyTorch layer over several processes passes the kit's questions, and the kit finds errors that only it can have."""

import pytest

from selfattn_core.conformance.backends import resolve
from selfattn_core.conformance.cases.table import all_runs
from selfattn_core.conformance.execution.in_process import judge_in_process
from selfattn_core.conformance.execution.runner import run_backend

pytest.importorskip("torch")

ROWS = "selfattn_torch.conformance.rows"
BROKEN = "selfattn_torch.conformance.broken_rows"

# Flat and pooled, where borders cut windows: output, map, first and second derivatives, ties, NaN, spectral norm.
FEW = {
    *("SA-FWD-001", "SA-FWD-002", "SA-MAP-001", "SA-MAP-002", "SA-VJP-001", "SA-VJP-002", "SA-VJP-026"),
    *("SA-GAN-001", "SA-GAN-002", "SA-MIX-001", "SA-MIX-002", "SA-NAN-001", "SA-NAN-002"),
    *("SA-SPN-001", "SA-SPN-003"),
}


def statuses(target, cases, processes):
    """The outcomes of the runs of some cases in one layout, by case."""
    backend = resolve(target)
    runs = [run for run in all_runs(level="gan") if run.case.id in cases and run.layout == "channels_last"]
    found = {}
    with backend.over(processes):
        for outcome in judge_in_process(backend, runs):
            found.setdefault(outcome.run.case.id, set()).add(outcome.status)
    assert set(found) == set(cases)
    return found


@pytest.mark.parametrize("kind", ["RowsBackend", pytest.param("streaming", marks=pytest.mark.slow)])
def test_rows_in_three_processes_are_the_layer(kind):
    assert statuses(f"{ROWS}:{kind}", FEW, 3) == {case: {"pass"} for case in FEW}


@pytest.mark.parametrize(
    ("mutant", "right", "wrong"),
    [
        ("doubled", "SA-FWD-001", "SA-VJP-001"),
        pytest.param("unshared", "SA-PAR-001", "SA-FWD-001", marks=pytest.mark.slow),
        pytest.param("halo", "SA-FWD-001", "SA-FWD-002", marks=pytest.mark.slow),
        pytest.param("cut", "SA-FWD-001", "SA-FWD-002", marks=pytest.mark.slow),
        pytest.param("order", "SA-PAR-001", "SA-MAP-001", marks=pytest.mark.slow),
    ],
)
def test_mutants_of_rows_are_found(mutant, right, wrong):
    found = statuses(f"{BROKEN}:{mutant}", {right, wrong}, 3)
    assert found[right] == {"pass"}
    assert "pass" not in found[wrong]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "processes"),
    [("torch-rows", 4), ("torch-rows", 2), ("torch-rows", 8), (f"{ROWS}:streaming", 4)],
)
def test_rows_reach_the_level_gan(target, processes):
    report = run_backend(target, runs=all_runs(level="gan"), over=processes)
    assert not report.error
    assert {outcome.run.id: outcome.message for outcome in report.outcomes if outcome.status != "pass"} == {}
    assert report.versions["processes"] == str(processes)


def test_a_backend_in_one_process_refuses_a_number_of_processes(on_path):
    report = run_backend("toy_backends:Good", runs=all_runs(level="core")[:1], over=2)
    assert report.refused
    assert "got 2 processes; this backend computes in one" in report.error


@pytest.mark.slow
def test_a_process_that_raises_is_reported_and_the_next_question_is_answered():
    backend = resolve(f"{ROWS}:RowsBackend")
    run = next(run for run in all_runs(level="core") if run.case.id == "SA-FWD-001")
    with backend.over(2):
        with pytest.raises(RuntimeError, match=r"rank \d of 2: [\s\S]*AttributeError"):
            backend._ask("no_such_method")
        (outcome,) = judge_in_process(backend, [run])
    assert outcome.status == "pass"
