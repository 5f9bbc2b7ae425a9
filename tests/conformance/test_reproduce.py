"""A failure can be repeated with the command and with `run_case`, and every report shows the command."""

import html
import json
import os
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner

from selfattn_core.cli import main
from selfattn_core.conformance.cases.table import all_runs
from selfattn_core.conformance.mutants import MUTANTS
from selfattn_core.conformance.reference import Reference
from selfattn_core.conformance.report import as_data, as_html, as_junit, as_markdown, as_table
from selfattn_core.conformance.reproduce import named_runs, run_case
from selfattn_core.conformance.results import BackendReport, Outcome
from selfattn_core.conformance.verdicts.expected import expect

REFERENCE = "selfattn_core.conformance.reference:Reference"
BY_NAME = {run.id: run for run in all_runs()}
FIRST = "SA-FWD-001/float32/channels_last"


def conform(*arguments: str):
    return CliRunner().invoke(main, ["conform", *arguments])


def test_a_case_is_named_by_its_id_or_with_dtype_and_layout():
    of_case = [run for run in all_runs() if run.case.id == "SA-FWD-001"]
    assert named_runs(["SA-FWD-001"]) == of_case
    assert [run.dtype for run in named_runs(["SA-FWD-001/float64"])] == ["float64"]
    assert named_runs([FIRST, "SA-FWD-001/float32"]) == [run for run in of_case if run.dtype == "float32"]
    # If the layout does not matter, the table lists only channels_last, but a report may name the other.
    assert [run.id for run in named_runs(["SA-FWD-001/float64/channels_first"])] == [
        "SA-FWD-001/float64/channels_last"
    ]


def test_unknown_cases_are_all_named():
    with pytest.raises(
        ValueError, match=r"SA-FWD-901.*SA-FWD-001/float3:.*did you mean SA-FWD-001/float32\?"
    ):
        named_runs(["SA-FWD-901", "SA-FWD-001/float3"])
    with pytest.raises(ValueError, match="case SA-GAN-001: not in the table up to level core"):
        named_runs(["SA-GAN-001"], level="core")


def test_only_the_named_runs_are_asked(tmp_path):
    file = tmp_path / "report.json"
    result = conform(REFERENCE, "--case", FIRST, "--case", "SA-MAP-001/float64", "--json", str(file))
    assert result.exit_code == 0, result.output
    (backend,) = json.loads(file.read_text(encoding="utf-8"))["backends"]
    found = [(outcome["case"], outcome["dtype"], outcome["layout"]) for outcome in backend["outcomes"]]
    assert found == [("SA-FWD-001", "float32", "channels_last"), ("SA-MAP-001", "float64", "channels_last")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([REFERENCE, "--case", "SA-FWD-901"], "--case: case SA-FWD-901"),
        (["--case", FIRST], "--case: name the BACKEND"),
        (["--diff", "a", "b", "--case", FIRST], "--diff compares two files and runs nothing"),
    ],
)
def test_what_is_no_choice_of_cases(arguments, words):
    result = conform(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


def test_a_case_in_python():
    (right,) = run_case(Reference(), FIRST, seed=7)
    assert right.status == "pass"
    (wrong,) = run_case(MUTANTS[0].make(), FIRST, seed=7)
    (verdict,) = wrong.verdicts
    assert (wrong.status, verdict.quantity, verdict.passed) == ("fail", "y", False)
    floor = expect(wrong.run.case, "float32", 7)["y"].floor
    assert verdict.ratio == pytest.approx(verdict.error / floor)
    (named,) = run_case(REFERENCE, FIRST, seed=7)
    assert named.verdicts == right.verdicts
    with pytest.raises(ValueError, match="did not start"):
        run_case("selfattn_core.conformance.reference:Absent", FIRST)
    with pytest.raises(ValueError, match="SA-FWD-901"):
        run_case(Reference(), "SA-FWD-901")


def test_an_object_is_not_given_a_device_in_silence():
    with pytest.raises(
        ValueError, match=r"only a named backend accepts a device: got device 'cuda:1'.*Reference"
    ):
        run_case(Reference(), FIRST, device="cuda:1")


def test_every_report_has_the_command_that_repeats_a_failure():
    runs = [
        BY_NAME[FIRST],
        BY_NAME["SA-FWD-002/float64/channels_last"],
        BY_NAME["SA-FWD-006/float64/channels_last"],
    ]
    outcomes = [
        Outcome(runs[0], "fail", (), "off"),
        Outcome(runs[1], "error", (), "a\nb"),
        Outcome(runs[2], "pass"),
    ]
    data = as_data([BackendReport("mine:B", outcomes=tuple(outcomes))], seed=5, device="cuda:1")
    commands = [f"selfattn conform mine:B --case {run.id} --seed 5 --device cuda:1" for run in runs]
    junit = "\n".join(ET.fromstring(as_junit(data)).itertext())  # noqa: S314 - of our own making
    for text in (as_table(data), as_markdown(data), html.unescape(as_html(data)), junit):
        assert [command in text for command in commands] == [True, True, False]


def test_the_command_in_a_report_repeats_the_failure(monkeypatch):
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])))
    found = conform("toy_backends:NotANumber", "--case", "SA-FWD-001", "--seed", "4").output
    failed = re.findall(
        r"^toy_backends:NotANumber: (SA-FWD-001.*)\n  selfattn conform (.*)$", found, re.MULTILINE
    )
    assert len(failed) == 2
    for words, command in failed:
        again = conform(*shlex.split(command))
        assert again.exit_code == 1
        assert again.output.count("SA-FWD-001 (") == 1
        assert words in again.output
