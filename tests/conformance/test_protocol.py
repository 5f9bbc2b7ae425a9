"""The kit accepts objects that follow the protocol of a backend, and refuses all others."""

import os

import pytest

from selfattn_core.conformance.execution.runner import run_backend
from selfattn_core.conformance.report import as_data, as_table
from tests.conformance.runs import FEW


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("toy_backends:Lacking", "lacks attention_map"),
        ("toy_backends:Boastful", "claims telepathy, expected some of forward, map"),
        ("toy_backends:Placeless", "has no layouts"),
        (
            "toy_backends:UnknownFailure",
            "expects SA-XYZ-001 to fail, but there is no such case; expects SA-FWD-001",
        ),
        (
            "toy_backends:UnclaimedFailure",
            (
                "expects SA-FWD-001/float23 to fail, but claims no run of that name; expected a name such as "
                "SA-FWD-001/float32/channels_last, or its beginning; expects SA-CMP-001 to fail"
            ),
        ),
        (
            "toy_backends:UnclaimedFailure",
            "expects SA-FWD-001/float32/channels_first to fail, but claims no run of that name",
        ),
        ("toy_backends:Absent", "toy_backends has no 'Absent'"),
        ("no_such_module:Backend", "No module named 'no_such_module'"),
    ],
)
def test_a_backend_that_does_not_start(on_path, target, words):
    report = run_backend(target, runs=FEW)
    assert not report.passed
    assert report.refused
    assert "Traceback" not in report.error
    assert words in report.error
    assert words in as_table(as_data([report]))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "Formless",
            [
                "versions() returns None, expected a mapping of names to versions",
                "layouts() returns 'channels_last', expected a tuple of channels_last, channels_first",
                "dtypes() returns 'float32', expected a tuple of",
                "expected_failures() returns ['SA-FWD-001'], expected a mapping of runs to (reason, link)",
                "forward is 3, expected a method",
                "update is 'later', expected a method",
                "name is None, expected a string",
            ],
        ),
        ("ClaimsAWord", ["claims() returns 'forward', expected a set of forward, map, vjp"]),
        ("ClaimsNone", ["claims() returns None, expected a set of forward"]),
        ("ClaimsAttribute", ["claims is ('forward',), expected a method"]),
        ("ClaimsOfSomething", ["claims() needs what, but the kit calls it without arguments"]),
        ("ClaimsMixed", ["claims 3, ['map'], expected some of forward"]),
        ("ExpectsNumber", ["lacks attention_map; expects 3 to fail, but there is no such case"]),
        (
            "Configured",
            [
                "the kit calls it without arguments to make a backend, but it needs path, device; name a backend object",
            ],
        ),
        ("configured", ["calls it without arguments to make a backend, but it needs path;"]),
        ("sys", ["lacks name, versions, claims, layouts, build"]),
    ],
)
def test_what_has_not_the_form_of_a_backend_is_refused(on_path, name, words):
    report = run_backend(f"toy_backends:{name}", runs=FEW[:1])
    assert report.refused
    assert "Traceback" not in report.error
    for each in words:
        assert each in report.error


def test_the_form_of_a_backend_is_not_narrower_than_its_use(on_path):
    report = run_backend("toy_backends:Generous", runs=FEW)
    assert report.passed, report.error
    assert report.claims == ("forward", "map")


def test_a_backend_whose_own_import_fails_is_shown_with_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "needy.py").write_text("import no_such_framework\n", encoding="utf-8")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    )
    report = run_backend("needy:Backend", runs=FEW)
    assert not report.refused
    assert "Traceback" in report.error
    assert "No module named 'no_such_framework'" in report.error
