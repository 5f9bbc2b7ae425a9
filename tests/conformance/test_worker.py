"""A backend in its own process: right answers, wrong answers and exceptions."""

import pytest

from selfattn_core.conformance.execution.runner import run_backend
from selfattn_core.conformance.report import as_data, as_table
from tests.conformance.runs import ASKED, FEW


def test_a_run_in_a_process_of_its_own(on_path):
    report = run_backend("toy_backends:Good", runs=FEW)
    assert report.passed
    assert report.versions == {"toy": "1"}
    assert report.claims == tuple(sorted(ASKED))
    assert report.seconds > 0
    assert len(report.outcomes) == len(FEW)
    assert "bit for bit" in as_table(as_data([report]))


def test_what_it_prints_does_not_matter(on_path):
    assert run_backend("toy_backends:Talks", runs=FEW).passed


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("WrongShape", "y: got shape (2, 1, 7, 24), expected (2, 5, 7, 24)"),
        ("WrongDtype", "y: got dtype float16, expected float32"),
        ("Complex", "y: got dtype complex64, expected float32"),
        ("Integers", "y: got dtype int64, expected float32"),
        ("NotANumber", "y: got NaN or infinity where a number was expected"),
        ("Objects", "y: got an array of dtype object, expected numbers"),
        ("Lists", "y: got list, expected a numpy array of numbers"),
        ("Nothing", "y: got NoneType, expected a numpy array of numbers"),
        ("NoMapping", "got list, expected a mapping of names to numpy arrays"),
        ("WrongNames", "missing query.kernel, key.kernel, value.kernel; unexpected query.weight"),
    ],
)
def test_a_wrong_answer_is_a_line_that_says_what_it_was(on_path, name, words):
    family = "vjp" if name in ("NoMapping", "WrongNames") else "forward"
    report = run_backend(f"toy_backends:{name}", runs=FEW)
    by_family = {outcome.run.case.family: outcome for outcome in reversed(report.outcomes)}
    assert by_family[family].status == "fail"
    assert words in by_family[family].message
    assert {o.status for o in report.outcomes if o.run.case.family != family} == {"pass"}


@pytest.mark.parametrize(
    ("name", "family", "words"),
    [
        ("Stretched", "forward", "y: got shape (524288, "),
        ("StretchedExtra", "vjp", "unexpected extra"),
    ],
)
def test_an_answer_that_would_fill_the_disk_is_a_line(on_path, name, family, words):
    report = run_backend(f"toy_backends:{name}", runs=FEW)
    failed = [outcome for outcome in report.outcomes if outcome.run.case.family == family]
    assert failed
    assert all(outcome.status == "fail" and words in outcome.message for outcome in failed)


def test_an_exception_is_an_error_in_its_case_only(on_path):
    report = run_backend("toy_backends:Raises", runs=FEW)
    assert {outcome.status for outcome in report.outcomes if outcome.run.case.family == "forward"} == {
        "error"
    }
    assert {outcome.status for outcome in report.outcomes if outcome.run.case.family != "forward"} == {"pass"}
    assert "a bug in here" in as_table(as_data([report]))
