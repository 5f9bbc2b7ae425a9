"""The plugin in the project of a user: items have the ids of runs, and failures show verdicts, not tracebacks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from selfattn_core.conformance.backends import KNOWN
from selfattn_core.conformance.cases.table import all_runs
from selfattn_core.conformance.search.probe import Probe, Step
from selfattn_core.conformance.search.token import to_token

HERE = Path(__file__).parent


@pytest.fixture
def theirs(tmp_path):
    """The project of a user, with one test."""
    (tmp_path / "test_own.py").write_text("def test_own():\n    assert True\n", encoding="utf-8")
    return tmp_path


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "selfattn_core.conformance.pytest_plugin",
    ]
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "200"},
    )


def test_cases_run_beside_their_own_tests(theirs):
    result = run_pytest(
        theirs, "-v", "-rs", "--selfattn-backend", "toy_backends:InferenceOnly", "-k", "own or FWD-00"
    )
    assert result.returncode == 0, result.stdout
    assert "selfattn: toy_backends:InferenceOnly at level deploy, seed 0" in result.stdout
    assert "test_own.py::test_own PASSED" in result.stdout
    assert "toy_backends:InferenceOnly::SA-FWD-001/float32/channels_last PASSED" in result.stdout
    assert (
        "toy_backends:InferenceOnly::SA-FWD-001/float32/channels_first SKIPPED (unclaimed)" in result.stdout
    )
    runs = [run for run in all_runs() if "FWD-00" in run.id]
    unclaimed = sum(run.layout == "channels_first" for run in runs)
    assert f"{1 + len(runs) - unclaimed} passed, {unclaimed} skipped" in result.stdout


def test_nothing_else_runs_if_this_package_is_named(theirs):
    arguments = [
        "--selfattn-backend",
        "toy_backends:InferenceOnly",
        "--selfattn-level",
        "core",
        "--selfattn-seed",
        "5",
    ]
    result = run_pytest(
        theirs, *arguments, "--pyargs", "selfattn_core.conformance", "-k", "float64 and channels_last"
    )
    assert result.returncode == 0, result.stdout
    assert "at level core, seed 5" in result.stdout
    assert "error" not in result.stdout.lower()
    assert "VJP" not in result.stdout


def test_a_failure_shows_the_verdict_and_no_traceback(theirs):
    result = run_pytest(
        theirs,
        "--selfattn-backend",
        "toy_backends:NotANumber",
        "--selfattn-backend",
        "toy_backends:Dies",
        "-k",
        "(FWD-001 or MAP-001) and float32 and channels_last",
    )
    assert result.returncode == 1
    assert "toy_backends:NotANumber SA-FWD-001/float32/channels_last" in result.stdout
    assert "fail: y: got NaN or infinity where a number was expected" in result.stdout
    assert "flat form (forward; SelfAttentionConfig(channels=24" in result.stdout
    assert "error: the process died by signal 11 in this case" in result.stdout
    again = "selfattn conform toy_backends:NotANumber --case SA-FWD-001/float32/channels_last"
    assert again in result.stdout.splitlines()
    assert "Traceback" not in result.stdout
    assert "pytest_plugin.py" not in result.stdout
    assert "2 failed, 2 passed" in result.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ClaimsNothing", "unclaimed, as is every other case of level core"),
        ("DeclinesAll", "channels today, as is every other case of level core"),
    ],
)
def test_a_backend_that_answers_nothing_fails_as_in_the_command(theirs, name, words):
    level = ["--selfattn-backend", f"toy_backends:{name}", "--selfattn-level", "core", "--tb", "short", "-x"]
    result = run_pytest(theirs, *level)
    assert result.returncode == 1
    assert words in result.stdout


def test_what_was_not_chosen_might_have_been_answered(theirs):
    """A backend that does not claim `map` passes no map case and fails none."""
    chosen = ["--selfattn-backend", "toy_backends:InferenceOnly", "-k", "MAP-001"]
    result = run_pytest(theirs, *chosen)
    assert result.returncode == 0, result.stdout
    assert "skipped" in result.stdout
    nothing = run_pytest(theirs, "--selfattn-backend", "toy_backends:ClaimsNothing", "-k", "MAP-001")
    assert nothing.returncode == 1


def test_a_backend_of_one_layout_is_asked_in_that_one(theirs):
    result = run_pytest(theirs, "--selfattn-backend", "toy_backends:ChannelsFirst", "-k", "MAP-001", "-v")
    assert result.returncode == 0, result.stdout
    assert "SA-MAP-001/float64/channels_last PASSED" in result.stdout


def test_expected_failures(theirs):
    result = run_pytest(
        theirs, "-rx", "--selfattn-backend", "toy_backends:KnownFailure", "-k", "FWD-001 and channels_last"
    )
    assert "xfailed" in result.stdout
    stale = run_pytest(
        theirs, "--selfattn-backend", "toy_backends:StaleFailure", "-k", "FWD-001 and channels_last"
    )
    assert "was expected to fail" in stale.stdout
    assert stale.returncode == 1


def test_a_backend_that_does_not_start_fails_every_case(theirs):
    result = run_pytest(theirs, "--selfattn-backend", "no_such_module:Backend", "-k", "FWD-001 and float32")
    assert result.returncode == 1
    assert "did not start" in result.stdout
    assert "No module named 'no_such_module'" in result.stdout


def test_wrong_options_are_told_at_once(theirs):
    result = run_pytest(theirs, "--selfattn-backend", "tensorfow")
    assert result.returncode == 4
    assert "--selfattn-backend tensorfow: expected module:object" in result.stderr
    assert "Traceback" not in result.stderr
    strange = run_pytest(theirs, "--selfattn-backend", ":", "--selfattn-backend", "a.b:")
    assert strange.returncode == 4
    assert "--selfattn-backend :, a.b:: expected module:object" in strange.stderr
    for seed in ("-1", "1.5"):
        negative = run_pytest(theirs, "--selfattn-seed", seed)
        assert negative.returncode == 4
        assert f"got {seed!r}, expected a whole number that is not negative" in negative.stderr


def test_every_backend_with_a_name_is_known(theirs):
    named = [part for name in KNOWN for part in ("--selfattn-backend", name)]
    result = run_pytest(theirs, "--collect-only", "-q", "-k", "SA-FWD-001/float64", *named)
    assert result.returncode == 0, result.stderr
    for name in KNOWN:
        assert f"{name}::SA-FWD-001/float64/channels_last" in result.stdout


def test_without_a_backend_it_changes_nothing(theirs):
    result = run_pytest(theirs, "-v")
    assert "1 passed" in result.stdout
    assert "selfattn: " not in result.stdout


def test_no_run_loads_it_unasked():
    entry_points = __import__("importlib.metadata").metadata.entry_points(group="pytest11")
    assert not [entry.value for entry in entry_points if entry.value.startswith("selfattn")]


def test_a_device(theirs):
    chosen = ["--selfattn-backend", "toy_backends:OnTwo", "-k", "FWD-001", "--selfattn-level", "core"]
    result = run_pytest(theirs, *chosen, "--selfattn-device", "toy")
    assert result.returncode == 0, result.stdout
    assert "at level core, seed 0, on toy" in result.stdout
    result = run_pytest(theirs, *chosen, "--selfattn-device", "card")
    assert result.returncode == 1
    assert "there is no device 'card' here; there are: cpu:0, cpu:1, toy:0." in result.stdout
    result = run_pytest(theirs, "--selfattn-backend", "torch", "--selfattn-device", "gpu")
    assert result.returncode == 4
    assert "torch: got device 'gpu'; expected one of cpu, cuda, mps, xpu" in result.stderr
    for backend, words in (
        ("torch", "one of cpu, cuda"),
        ("toy_backends:OnTwo", "a word of this backend's own"),
    ):
        result = run_pytest(theirs, "--selfattn-backend", backend, "--selfattn-device", "")
        assert result.returncode == 4
        assert f"{backend}: got device ''; expected {words}" in result.stderr
    result = run_pytest(theirs, *chosen, "--selfattn-device", "toy", "--selfattn-device", "cpu")
    assert result.returncode == 4
    assert "got toy and cpu; expected one device a run" in result.stderr


def test_a_token_is_an_item_that_fails_is_skipped_or_cannot_be_judged(theirs):
    asked = ["--pyargs", "selfattn_core.conformance", "-k", "S1", "-rs", "--selfattn-backend"]
    mixed, undecided, params = (
        to_token(probe)
        for probe in (
            Probe(steps=(Step("mixed"),)),
            Probe(pool=2, rows="equal"),
            Probe(steps=(Step("params"),)),
        )
    )
    options = [option for token in (mixed, undecided) for option in ("--selfattn-replay", token)]
    judged = run_pytest(theirs, *asked, "planted:ForwardOnly", *options)
    assert "unclaimed: the backend does not claim mixed" in judged.stdout
    assert "undecided: " in judged.stdout
    assert "1 failed, 1 skipped" in judged.stdout
    wrong = run_pytest(theirs, *asked, "planted:OwnParams", "--selfattn-replay", params)
    assert "fail: weights are copies" in wrong.stdout
    assert f"selfattn conform planted:OwnParams --replay {params}" in wrong.stdout
