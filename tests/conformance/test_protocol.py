"""What has the form of a backend, and what has not."""

import os

import pytest

from selfattn_core.conformance.execution.runner import run_backend
from selfattn_core.conformance.report import as_data, as_table
from tests.conformance.runs import FEW


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("toy_backends:Lacking", "lacks attention_map"),
        ("toy_backends:Boastful", "claims telepathy, where there are forward, map"),
        ("toy_backends:Placeless", "has no layouts"),
        ("toy_backends:UnknownFailure", "expects SA-XYZ-001 to fail, which is no case; expects SA-FWD-001"),
        (
            "toy_backends:UnclaimedFailure",
            (
                "expects SA-FWD-001/float23 to fail, which names no run that it claims, as in "
                "SA-FWD-001/float32/channels_last or its beginning; expects SA-CMP-001 to fail"
            ),
        ),
        (
            "toy_backends:UnclaimedFailure",
            "expects SA-FWD-001/float32/channels_first to fail, which names no run that it claims",
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
                "versions() gives None, where a mapping of names to versions is needed",
                "layouts() gives 'channels_last', where a tuple of channels_last, channels_first is needed",
                "dtypes() gives 'float32', where a tuple of",
                "expected_failures() gives ['SA-FWD-001'], where a mapping of runs to (reason, link) is needed",
                "forward is 3, where a method is needed",
                "update is 'later', where a method is needed",
                "name is None, where a string is needed",
            ],
        ),
        ("ClaimsAWord", ["claims() gives 'forward', where a set of forward, map, vjp"]),
        ("ClaimsNone", ["claims() gives None, where a set of forward"]),
        ("ClaimsAttribute", ["claims is ('forward',), where a method is needed"]),
        ("ClaimsOfSomething", ["claims() needs what, where it is called without arguments"]),
        ("ClaimsMixed", ["claims 3, ['map'], where there are forward"]),
        ("ExpectsNumber", ["lacks attention_map; expects 3 to fail, which is no case"]),
        (
            "Configured",
            [
                "it is called without arguments to make a backend, and needs path, device; name an object that",
            ],
        ),
        ("configured", ["called without arguments to make a backend, and needs path;"]),
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
