"""After a process crashes, hangs or exits, the other runs still get answers."""

import pytest

from selfattn_core.conformance.execution.runner import run_backend
from tests.conformance.runs import FEW


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Dies", "the process died by signal 11 in this case"),
        ("Leaves", "the process exited with code 9 in this case"),
        ("LeavesCalmly", "the process exited with code 0 in this case"),
        ("Hangs", "the process was ended after 1 s in this case"),
    ],
)
def test_a_crash_is_an_error_in_its_case_and_the_others_run(on_path, name, words):
    runs = [run for run in FEW if run.case.id != "SA-MAP-002"]
    report = run_backend(f"toy_backends:{name}", runs=runs, timeout=1)
    maps = [outcome for outcome in report.outcomes if outcome.run.case.family == "map"]
    assert len(maps) == 2
    assert {outcome.status for outcome in maps} == {"error"}
    assert all(words in outcome.message for outcome in maps)
    others = [outcome for outcome in report.outcomes if outcome.run.case.family != "map"]
    assert {outcome.status for outcome in others} == {"pass"}
    assert not report.passed


def test_a_backend_that_always_hangs_is_given_up(on_path):
    runs = [run for run in FEW if run.case.family == "forward"] * 2
    report = run_backend("toy_backends:NeverAnswers", runs=runs, timeout=0.5)
    messages = [outcome.message for outcome in report.outcomes]
    assert messages[:3] == ["the process was ended after 0.5 s in this case: it printed nothing"] * 3
    assert messages[3:] == ["not reached: given up after 3 timeouts in a row, of 0.5 s each"] * 5


def test_timeouts_with_answers_between_them_are_not_in_a_row(on_path):
    (answered, *_), hanging = (
        [run for run in FEW if run.case.family == family] for family in ("forward", "map")
    )
    runs = [run for one in hanging[:3] for run in (one, answered)]
    report = run_backend("toy_backends:Hangs", runs=runs, timeout=0.7)
    assert [outcome.status for outcome in report.outcomes] == ["error", "pass"] * 3
    assert "not reached" not in "".join(outcome.message for outcome in report.outcomes)


def test_a_process_that_leaves_before_it_has_started(on_path):
    report = run_backend("toy_backends:LeavesAtOnce", runs=FEW)
    assert report.error == "the process exited with code 0 while the backend was imported: it printed nothing"


def test_a_backend_that_always_dies_is_not_started_for_ever(on_path, monkeypatch):
    monkeypatch.setattr("selfattn_core.conformance.execution.supervisor._MOST_PROCESSES", 2)
    report = run_backend("toy_backends:Dies", runs=FEW)
    messages = [outcome.message for outcome in report.outcomes if outcome.run.case.family == "map"]
    assert [("in this case" in message, "not reached" in message) for message in messages] == [
        (True, False),
        (True, False),
        (False, True),
        (False, True),
    ]
