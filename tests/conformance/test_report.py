"""The forms of a report: all contain the same facts, and no text breaks them."""

import copy
import dataclasses
import html.parser
import json
import re
from xml.etree import ElementTree as ET

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner

from selfattn_core.cli import main
from selfattn_core.cli.conform import forms
from selfattn_core.conformance.cases.case import Run
from selfattn_core.conformance.cases.table import CASES, all_runs
from selfattn_core.conformance.execution.runner import run_backend
from selfattn_core.conformance.mutants import MUTANTS
from selfattn_core.conformance.mutants.selftest import Kill
from selfattn_core.conformance.questions.training import STEPS, reference
from selfattn_core.conformance.report import (
    as_data,
    as_html,
    as_junit,
    as_markdown,
    as_table,
    difference,
    schema,
    show,
)
from selfattn_core.conformance.results import BackendReport, Outcome
from selfattn_core.conformance.verdicts.tolerance import Verdict
from selfattn_core.conformance.verdicts.trajectory import curve_floors
from tests.conformance.runs import FEW

HOSTILE = (
    'a <script>alert("1")</script> & | `tick` :X :smile: [red]\x00\x1b[31m\x9b1A\ufffe\udc80\nsecond line'
)


def runs_of(*cases: str) -> list[Run]:
    return [run for run in all_runs() if run.case.id in cases and run.layout == "channels_last"]


def passing(run: Run, ratio: float = 0.5) -> Outcome:
    return Outcome(run, "pass", (Verdict("y", 1e-7, ratio, True),))


def report(name: str, outcomes: list[Outcome], version: str = "1.2", **more) -> BackendReport:
    return BackendReport(
        name, {"framework": version}, ("forward",), ("channels_last",), ("float32",), tuple(outcomes), **more
    )


@pytest.fixture(scope="module")
def reports() -> list[BackendReport]:
    forward, trained = runs_of("SA-FWD-001"), runs_of("SA-TRN-001")
    curve = reference(trained[0].case, seed=3).losses
    spec_curve = {
        "reference": tuple(curve.tolist()),
        "floors": tuple(curve_floors(trained[0].case, "float32", seed=3).tolist()),
    }
    strayed = tuple(float(loss) for loss in 1.01 * curve[:150]) + (float("nan"),) * (STEPS - 150)
    good = [
        passing(forward[0], 0.25),
        passing(forward[1], 1.5),
        Outcome(
            trained[0],
            "pass",
            (Verdict("loss", 1e-7, 0.8, True),),
            losses=tuple(curve * (1 + 1e-8)),
            **spec_curve,
        ),
    ]
    bad = [
        Outcome(forward[0], "fail", (Verdict("y", 0.1, 1e6, False),), f"y: error 0.1 {HOSTILE}"),
        Outcome(forward[1], "error", (), f"Traceback\n  File somewhere\nRuntimeError: {HOSTILE}"),
        Outcome(
            trained[0], "fail", (Verdict("loss", np.inf, np.inf, False),), "NaN", losses=strayed, **spec_curve
        ),
    ]
    others = [
        Outcome(forward[0], "unclaimed", (), "cannot pool"),
        Outcome(
            forward[1], "expected-failure", (Verdict("y", 1, 9.0, False),), "off", "a known bug", "issue 7"
        ),
    ]
    return [
        report("good", good, seconds=3.25),
        report(f"bad {HOSTILE}", bad, f"1.0 {HOSTILE}"),
        report("others", others),
        BackendReport("absent", missing=("framework",), extra="framework"),
        BackendReport("broken", error=f"Traceback\nImportError: {HOSTILE}"),
    ]


@pytest.fixture(scope="module")
def kills() -> list[Kill]:
    caught = Outcome(runs_of("SA-FWD-001")[0], "fail", (Verdict("y", 1, 5e6, False),), "y: error")
    crashed = Outcome(runs_of("SA-FWD-001")[1], "error", (), "Traceback\nValueError: shapes")
    return [
        Kill(MUTANTS[0], caught, 3, 4),
        Kill(MUTANTS[1], crashed, 1, 4),
        Kill(MUTANTS[2], None, 0, 4),
    ]


@pytest.fixture(scope="module")
def data(reports, kills) -> dict:
    return as_data(reports, seed=3, level="training", kills=kills)


def test_the_data_fits_the_schema_and_json(data):
    jsonschema.Draft202012Validator.check_schema(schema())
    text = json.dumps(data, allow_nan=False)
    jsonschema.validate(json.loads(text), schema())
    assert data["backends"][1]["outcomes"][2]["ratios"] == {"loss": None}
    (curves,) = data["trajectories"]
    assert (curves["case"], curves["dtype"]) == ("SA-TRN-001", "float32")
    assert list(curves["losses"]) == ["good", data["backends"][1]["name"]]
    assert curves["losses"]["good"][:2] == list(
        reference(runs_of("SA-TRN-001")[0].case, seed=3).losses[:2] * (1 + 1e-8)
    )
    assert curves["losses"][data["backends"][1]["name"]][149:151] == [1.01 * curves["reference"][149], None]
    assert [kill["killed"] for kill in data["kills"]] == [True, True, False]
    assert [kill["ratio"] for kill in data["kills"]] == [5e6, None, None]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d.update(schema=2),
        lambda d: d.update(remark="more"),
        lambda d: d.pop("seed"),
        lambda d: d["backends"][0].update(level="perfect"),
        lambda d: d["backends"][0]["outcomes"][0].update(status="passed"),
        lambda d: d["backends"][0]["outcomes"][0].update(case="FWD-1"),
        lambda d: d["backends"][0]["outcomes"][0]["ratios"].update(y=-1.0),
        lambda d: d["backends"][0]["outcomes"][0]["ratios"].update(y="0.5"),
        lambda d: d["trajectories"][0]["floors"].append(None),
        lambda d: d["kills"][0].pop("seen_in"),
    ],
)
def test_the_schema_refuses_what_is_not_a_report(data, spoil):
    spoiled = copy.deepcopy(data)
    spoil(spoiled)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(spoiled, schema())


def test_the_table(data):
    table = as_table(data)
    rows = {line[:20].strip(): line for line in table.splitlines()}
    assert re.search(r"1\.50 ×.*2 of 2 FAILED.*1 of 1 fail as expected.*missing.*error", rows["forward"])
    assert rows["training, 200 steps"].split("steps")[1].split()[:2] == ["0.80", "×"]
    assert "R1 penalty" not in table, "level training was asked for"
    assert "at most" not in rows["forward"]
    assert "up to 8 × passes in float32 and float64" in table
    assert "absent: framework not installed: pip install 'selfattn[framework]'" in table
    assert "broken: did not start: Traceback" in table
    assert (
        f"{MUTANTS[2].name}" in rows[f"{MUTANTS[2].name}"[:18].strip()] if len(MUTANTS[2].name) < 18 else True
    )
    assert "SURVIVED" in table
    assert "2 of 3 mutants caught." in table


@pytest.mark.parametrize("form", [*forms().values(), as_table], ids=[*forms(), "table"])
def test_what_a_backend_says_spoils_no_form(data, form):
    text = form(data)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\ud800-\udfff]", text)
    assert text.encode("utf-8").decode("utf-8") == text
    assert "udc80" in text, "it is said what could not be shown"
    assert ":X :smile: [red]" in text.replace("\\[", "[").replace("\\]", "]")


def test_versions_are_shown_as_messages_are(reports):
    strange = dataclasses.replace(reports[0], versions={"lib\x1b[31m\udc80": "1.0\x1b[31m\x00\udc80"})
    (backend,) = as_data([strange])["backends"]
    assert backend["versions"] == {"lib[31m\\udc80": "1.0[31m\\udc80"}


def test_many_problems_are_cut_short_in_the_terminal_only(reports):
    outcomes = [Outcome(run, "fail", (), f"wrong {run.id}") for run in runs_of(*_ids("SA-FWD-0"))[:18]]
    data = as_data([report("bad", outcomes)])
    assert len(outcomes) == 18
    assert as_table(data).count("wrong SA-FWD") == 10
    assert "bad: and 8 more; --json FILE lists them all" in as_table(data)
    for form in (as_html, as_markdown, as_junit):
        assert form(data).count("wrong SA") == 18


def test_a_backend_that_answers_nothing_is_told_why_it_fails():
    runs = runs_of("SA-FWD-001")
    nothing = [Outcome(run, "unclaimed") for run in runs]
    declined = [nothing[0], Outcome(runs[1], "unclaimed", (), "cannot pool")]
    some = [nothing[0], passing(runs[1])]
    data = as_data([report("a", nothing), report("b", declined), report("c", some)], level="core")
    first = "claims no case of level core"
    second = "answers no case of level core; the first reason: cannot pool"
    assert f"a: {first}\n\nb: {second}" in as_table(data)
    assert "\nc: " not in as_table(data)
    for form in (as_markdown, as_html):
        assert f"{first}<" in form(data) or f"- {first}\n" in form(data)
        assert second in form(data)
    suites = list(ET.fromstring(as_junit(data)))  # noqa: S314 - of our own making
    assert [suite.get("failures") for suite in suites] == ["1", "1", "0"]
    assert suites[0].find("testcase[@name='claims']/failure").get("message") == first


def _ids(prefix: str) -> list[str]:
    return [case.id for case in CASES if case.id.startswith(prefix)]


def test_a_terminal_shows_the_same_in_colours(data, monkeypatch, capsys):
    show(data)
    assert capsys.readouterr().out == as_table(data) + "\n"
    monkeypatch.setattr("click.utils.should_strip_ansi", lambda *_: False)
    show(data)
    coloured = capsys.readouterr().out
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == as_table(data) + "\n"
    assert re.search(r"\x1b\[31m2 of 2 FAILED *\x1b", coloured)


def test_a_terminal_takes_no_name_for_a_language_of_its_own(capsys):
    """A library for tables turned `…:X` into a cross, and brackets into a colour or an error."""
    name = "nosuch.mod:X or a.b:smile: [red] [/]"
    show(as_data([BackendReport(name, error="no :X: here")]))
    printed = capsys.readouterr().out
    assert printed.count(name) == 3
    assert "did not start: no :X: here" in printed


def test_junit(data):
    root = ET.fromstring(as_junit(data))  # noqa: S314 - of our own making
    suites = {suite.get("name"): suite for suite in root}
    assert [
        (s.get("tests"), s.get("failures"), s.get("errors"), s.get("skipped")) for s in suites.values()
    ] == [
        ("3", "0", "0", "0"),
        ("3", "2", "1", "0"),
        ("2", "0", "0", "2"),
        ("1", "0", "1", "0"),
        ("1", "0", "1", "0"),
        ("3", "1", "0", "0"),
    ]
    good = suites["good"]
    assert good.get("time") == "3.250"
    assert good.find("properties/property").attrib == {"name": "framework", "value": "1.2"}
    names = [case.get("name") for case in good.findall("testcase")]
    assert names == [
        "SA-FWD-001/float32/channels_last",
        "SA-FWD-001/float64/channels_last",
        "SA-TRN-001/float32/channels_last",
    ]
    assert good.find("testcase").get("classname") == "good.forward"
    skipped = [case.find("skipped").get("message") for case in suites["others"].findall("testcase")]
    assert skipped == ["unclaimed: cannot pool", "expected: a known bug (issue 7)"]
    assert "framework not installed" in suites["absent"].find("testcase/error").get("message")


def test_markdown_is_whole(data):
    text = as_markdown(data)
    assert not re.search(r"(?<!\\)<script", text)
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    assert len(tables) == 5
    for lines in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, lines[0]
    assert "| good | ✅ 1.50 × | ✅ 0.80 × | no level |" in text
    assert "❌ 2 of 2 FAILED" in text
    assert "❌ nothing" in text
    assert re.search(r"^## ❌ selfattn conformance$", text, re.MULTILINE)


def test_a_backend_puts_no_link_into_markdown(data):
    links = "[here](https://example.org/a) https://example.org/b www.example.org/c ![p](q)"
    changed = copy.deepcopy(data)
    changed["backends"][0]["versions"] = {"mine": links}
    text = as_markdown(changed)
    assert "example.org/b" in text
    assert not re.search(r"(?<!\\)\[here|://example|www\.example|(?<!\\)\[p", text)


class Page(html.parser.HTMLParser):
    """Collects the content of a page, and checks that its elements are closed in order."""

    VOID = ("meta", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def test_the_page_is_whole_and_needs_nothing_else(data):
    text = as_html(data)
    page = Page(text)
    assert page.addresses == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?:", text.replace("http://www.w3.org", ""))
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    assert "1 of 5 backends pass" not in page.text
    assert "2 of 5 backends pass, 2 of 3 mutants caught" in page.text
    for words in (
        "good",
        "0.80 ×",
        "2 of 2 FAILED",
        "unclaimed",
        "a known bug (issue 7)",
        "survived",
        "seed 3",
        "Up to 8 in float32 and float64, 4 in bfloat16 and float16 passes",
    ):
        assert words in page.text
    assert 'alert("1")' in page.text, "hostile text is shown, not run"
    # The loss and the deviation of the only trajectory.
    assert page.tags.count("svg") == 2
    assert page.tags.count("polyline") == 5
    assert page.tags.count("polygon") == 1


def test_a_page_of_good_news(reports):
    page = Page(as_html(as_data(reports[:1])))
    assert "✓ The backend passes" in page.text
    assert "Problems" not in page.text
    assert "good passed every claimed check." in page.text


def test_a_curve_is_drawn_where_its_values_are(data):
    (polyline,) = re.findall(r'<polyline class="c1" points="([^"]*)"><title>bad', as_html(data))[:1]
    points = [tuple(map(float, point.split(","))) for point in polyline.split()]
    assert len(points) == 150, "the curve ends where the losses do"
    losses = data["trajectories"][0]["reference"]
    xs, ys = zip(*points, strict=True)
    assert all(np.diff(xs) > 0)
    heights = np.array(ys)
    expected = 1.01 * np.array(losses[:150])
    slope, offset = np.polyfit(expected, heights, 1)
    assert slope < 0
    assert np.abs(slope * expected + offset - heights).max() < 0.1


def changed(data: dict, backend: int, outcome: int, **fields) -> dict:
    new = copy.deepcopy(data)
    new["backends"][backend]["outcomes"][outcome].update(fields)
    return new


def test_nothing_changed(data):
    found = difference(data, copy.deepcopy(data))
    assert str(found) == "nothing changed"
    assert found.regressions == []


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (
            lambda d: changed(d, 0, 0, status="fail", message="y: off"),
            "regressions",
            "fail, before pass: y: off",
        ),
        (
            lambda d: changed(d, 0, 1, status="unclaimed"),
            "regressions",
            "float64/channels_last: no longer claimed",
        ),
        (
            lambda d: changed(d, 0, 0, status="expected-failure", reason="known"),
            "regressions",
            "its failure is now expected: known",
        ),
        (
            lambda d: changed(d, 1, 0, status="pass"),
            "fixed",
            "SA-FWD-001/float32/channels_last: pass, before fail",
        ),
        (lambda d: changed(d, 0, 1, ratios={"y": 4.5}), "moved", "4.5 × the noise floor, before 1.5 ×"),
        (lambda d: changed(d, 0, 0, ratios={"y": 3.9}), "moved", ""),
    ],
)
def test_what_changed_is_said_in_its_place(data, change, kind, words):
    found = difference(data, change(data))
    for name in ("regressions", "fixed", "moved", "versions", "notes"):
        lines = getattr(found, name)
        assert len(lines) == (name == kind and words != ""), name
    assert words in str(found)


def test_backends_that_come_and_go(data):
    new = copy.deepcopy(data)
    new["backends"][0].update(error="Traceback\nImportError: gone", outcomes=[])
    new["backends"][3].update(missing=[], versions={"framework": "2"})
    new["backends"][2].update(versions={"framework": "1.3"}, level="core")
    new["backends"].append(dict(new["backends"][2], name="newcomer"))
    del new["backends"][4]
    new["spec"] += 1
    found = difference(data, new)
    assert found.regressions == ["good: did not start: ImportError: gone"]
    assert "absent: starts, before: framework not installed" in found.fixed
    assert "others: conformant at core, before at none" in found.fixed
    assert set(found.versions) == {
        f"spec: spec {data['spec']} → {new['spec']}",
        "others: framework 1.2 → 1.3",
        "absent: framework none → 2",
    }
    assert found.notes == ["broken: only in the first report", "newcomer: only in the second report"]
    back = difference(new, data)
    assert "others: conformant at no level, before at core" in back.regressions
    assert "absent: framework not installed" in back.regressions


DAMAGES = {
    "backends: got 3, expected array": lambda d: d.update(backends=3),
    "seed: missing; versions: got 'new', expected object": lambda d: (
        d.pop("seed"),
        d.update(versions="new"),
    ),
    "backends[1]: got None, expected object": lambda d: d["backends"].__setitem__(1, None),
    "backends[0].level: got 'perfect', which fits no alternative": lambda d: d["backends"][0].update(
        level="perfect"
    ),
    "backends[0].missing: got True, expected array": lambda d: d["backends"][0].update(missing=True),
    "outcomes[0].ratios.y: got '0.5', expected number or null": (
        lambda d: d["backends"][0]["outcomes"][0]["ratios"].update(y="0.5")
    ),
    "outcomes[0].ratios.y: got False, expected": lambda d: d["backends"][0]["outcomes"][0]["ratios"].update(
        y=False
    ),
    "outcomes[0].status: got 'passed', expected one of pass, fail": (
        lambda d: d["backends"][0]["outcomes"][0].update(status="passed")
    ),
    "factors.float64: missing": lambda d: d["factors"].pop("float64"),
    "levels.training: missing": lambda d: d["levels"].pop("training"),
}


@pytest.mark.parametrize("words", DAMAGES)
def test_what_is_no_report_is_not_compared(data, words):
    damaged = copy.deepcopy(data)
    DAMAGES[words](damaged)
    with pytest.raises(ValueError, match=re.escape(words)) as told:
        difference(data, damaged)
    assert "the second report is not a report of selfattn conform --json: " in str(told.value)
    with pytest.raises(ValueError, match="the first report"):
        difference(damaged, data)


def test_what_later_versions_add_does_not_keep_a_report_from_being_read(data):
    later = copy.deepcopy(data)
    later.update(remark=["more"])
    later["backends"][0]["outcomes"][0].update(weather={"sky": "blue"})
    assert str(difference(data, later)) == "nothing changed"


def test_of_many_damages_some_are_told(data):
    damaged = copy.deepcopy(data)
    damaged["backends"] = [3] * 25
    with pytest.raises(
        ValueError, match=r"backends\[19\]: got 3, expected object; and 5 more\. Write it again"
    ):
        difference(data, damaged)


def test_other_inputs_and_levels_are_not_compared(data):
    new = changed(data, 0, 1, ratios={"y": 4.5})
    new.update(seed=4, level="core")
    del new["backends"][0]["outcomes"][2]
    found = difference(data, new)
    assert found.regressions == found.moved == []
    assert len(found.notes) == 2
    new.update(level="training")
    assert (
        "good: 1 runs are missing, such as SA-TRN-001/float32/channels_last"
        in difference(data, new).regressions
    )


def test_the_command_tells_a_regression_by_its_exit_code(data, tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(data), encoding="utf-8")
    new.write_text(json.dumps(changed(data, 0, 0, status="error", message="died")), encoding="utf-8")
    run = CliRunner().invoke
    worse = run(main, ["conform", "--diff", str(old), str(new)])
    assert worse.exit_code == 1
    assert "regressions:\n  good: SA-FWD-001/float32/channels_last: error, before pass: died" in worse.output
    better = run(main, ["conform", "--diff", str(new), str(old)])
    assert better.exit_code == 0
    assert "fixed:" in better.output
    new.write_text("{}", encoding="utf-8")
    strange = run(main, ["conform", "--diff", str(old), str(new)])
    assert strange.exit_code == 2
    assert "the second report has schema None, but this selfattn reads schema 1" in strange.output
    new.write_text('{"schema": 1, "backends": 3}', encoding="utf-8")
    damaged = run(main, ["conform", "--diff", str(old), str(new)])
    assert damaged.exit_code == 2
    assert "seed: missing" in damaged.output
    assert "backends: got 3, expected array. Write it again." in damaged.output
    new.write_text("no json", encoding="utf-8")
    assert run(main, ["conform", "--diff", str(old), str(new)]).exit_code == 2
    assert run(main, ["conform", "--diff", str(old), str(tmp_path / "none.json")]).exit_code == 2
    assert (
        f"{tmp_path / 'none.json'}: no such file."
        in run(main, ["conform", "--diff", str(old), str(tmp_path / "none.json")]).output
    )
    assert "is a folder" in run(main, ["conform", "--diff", str(old), str(tmp_path)]).output
    assert run(main, ["conform", "torch", "--diff", str(old), str(old)]).exit_code == 2


def test_the_json_holds_every_verdict(on_path):
    report = run_backend("toy_backends:NotANumber", runs=FEW)
    content = json.loads(json.dumps(as_data([report]), allow_nan=False))
    (backend,) = content["backends"]
    assert backend["passed"] is False
    assert len(backend["outcomes"]) == len(FEW)
    forward = [outcome for outcome in backend["outcomes"] if outcome["family"] == "forward"]
    assert forward[0]["ratios"] == {"y": None}
    assert "NaN" in forward[0]["message"]
