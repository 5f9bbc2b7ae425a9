"""The search: what it draws, what it finds, and how small it makes it."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import hypothesis
import jsonschema
import numpy as np
import pytest

from selfattn_core.conformance.protocol import Claims
from selfattn_core.conformance.questions.views import viewed
from selfattn_core.conformance.reference import Reference
from selfattn_core.conformance.report import as_data, as_html, as_junit, as_markdown, as_table, schema
from selfattn_core.conformance.search import explore
from selfattn_core.conformance.search.asking import Answers, ask_steps
from selfattn_core.conformance.search.drawing import drawn, searched_claims
from selfattn_core.conformance.search.judging import findings, worst
from selfattn_core.conformance.search.material import material
from selfattn_core.conformance.search.past import PastFailures
from selfattn_core.conformance.search.probe import ASKS, Probe, Step
from selfattn_core.conformance.search.process import Ready
from selfattn_core.conformance.search.run import search_backend
from selfattn_core.conformance.search.strategies import probes
from selfattn_core.conformance.search.token import TokenError, from_token, to_token
from tests.conformance import planted

CLAIMS = searched_claims(Reference())

QUICK = (
    "TransposesSquares",
    "OwnParams",
    "BeginsAnew",
    "MapOverwrites",
)
"""Planted bugs of several kinds that are found within seconds. The tests of the others are slow."""

WITHOUT_SIZES = set(planted.PLANTED) - {
    "SixteenRows",
    "WideQuery",
    "WideValue",
    "WindowsOfFive",
    "ManySamples",
    "third_block",
    "far_keys",
    "many_scores",
    "narrow_row_sums",
}
"""Planted bugs that maps of eight positions with eight channels show."""


def some_probes(number: int, claims: Claims = CLAIMS) -> list[Probe]:
    found = []

    @hypothesis.seed(8)
    @hypothesis.settings(
        max_examples=number,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(probes(claims))
    def collect(probe):
        found.append(probe)

    collect()
    return found


def test_the_definition_passes():
    asked = some_probes(40)
    for probe in asked:
        assert findings(probe, ask_steps(Reference(), probe)) == (), to_token(probe)
    assert {step.ask for probe in asked for step in probe.steps} >= {
        "forward",
        "vjp",
        "r1",
        "mixed",
        "training_pass",
    }
    assert max(worst(probe, ask_steps(Reference(), probe)) for probe in asked[:20]) > 0.1, (
        "something was compared"
    )


def test_every_draw_is_a_layer_that_the_backend_claims():
    claims = Claims({"forward", "vjp"}, ("channels_first",), ("float32", "bfloat16"))
    for probe in some_probes(200, claims):
        assert from_token(to_token(probe)) == probe
        assert probe.layout == "channels_first"
        assert probe.dtype in claims.dtypes
        assert not probe.norm
        assert {step.ask for step in probe.steps} <= {
            "forward", "vjp", "refilled", "permuted", "alone", "doubled", "shifted",
        }  # fmt: skip


@pytest.mark.slow
def test_the_draws_reach_what_the_table_does_not_have():
    asked = some_probes(1500)
    for reached in (
        lambda p: p.height == p.width > 1 and p.pool == 1,
        lambda p: p.height * p.width % 16 == 0,
        lambda p: p.channels == 1,
        lambda p: p.value == 1,
        lambda p: p.qk > 64,
        lambda p: p.value > 256,
        lambda p: p.height * p.width > 2048,
        lambda p: p.batch > 16,
        lambda p: p.pool == 5,
        lambda p: p.height == p.width and p.pool > 1,
        lambda p: p.norm and p.pool == 2 and p.out and not p.bias,
        lambda p: p.norm and p.batch == 1,
        lambda p: p.norm and p.sigma == -12 and p.state == "random",
        lambda p: p.zero_biases,
        lambda p: p.dy_view == "still",
        lambda p: p.x_view == "reversed",
        lambda p: p.poison == "dy",
        lambda p: p.dy_scale == 16,
        lambda p: p.gamma < -100,
        lambda p: p.dtype == "float64" and any(s.ask == "training_vjp" for s in p.steps),
        lambda p: p.dtype == "float64" and any(s.ask == "compiled_forward" for s in p.steps),
        lambda p: len([s for s in p.steps if s.ask == "training_pass"]) == 2,
        lambda p: any(s.ask == "r1" for s in p.steps) and p.logits == 30,
        lambda p: {s.place for s in p.steps} == {"", "input", "layer"},
        lambda p: p.steps[0].ask == "together",
        lambda p: p.steps[0].ask == "often",
        lambda p: p.steps[0].ask == "worn" and p.norm,
    ):
        assert any(map(reached, asked))


def test_a_search_asks_the_same_on_every_machine(tmp_path):
    """Constants in files of the user, which hypothesis mixes into wider draws, change nothing."""
    script = (
        "import sys; {}\n"
        "from tests.conformance.test_search import some_probes, to_token\n"
        "print(*map(to_token, some_probes(50)))\n"
    )
    (tmp_path / "theirs.py").write_text("X = (3, 5, 7, 12345, 17)\n", encoding="utf-8")
    told = []
    for first in ("", f"sys.path.insert(0, {str(tmp_path)!r}); import theirs"):
        here = Path(__file__).parent
        path = os.pathsep.join([str(here.parents[1]), str(here)])
        run = subprocess.run(
            [sys.executable, "-c", script.format(first)],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        told.append(run.stdout)
    assert told[0] == told[1]
    assert told[0].count("S1:") == 50


def test_equal_probes_have_equal_numbers():
    for probe in some_probes(20):
        first = material(probe)
        material.cache_clear()
        second = material(probe)
        assert first.x[0].tobytes() == second.x[0].tobytes()
        assert all(
            first.layers[1][name].tobytes() == second.layers[1][name].tobytes() for name in first.layers[1]
        )


PATIENCE = 20


@pytest.fixture
def first_only(monkeypatch):
    monkeypatch.setattr(explore, "_MOST_FINDINGS", 1)


@pytest.fixture
def patient(monkeypatch):
    """The same probes in more time, so that a slow machine asks all of them."""
    monkeypatch.setattr(explore, "PROBES_PER_SECOND", explore.PROBES_PER_SECOND / PATIENCE)
    monkeypatch.setattr(explore, "_SHRINK_SECONDS", explore._SHRINK_SECONDS * PATIENCE)


def caught(name: str, seconds: float) -> None:
    report = search_backend(f"planted:{name}", seconds=seconds * PATIENCE)
    assert report.search is not None, report.error
    assert report.search.findings, f"{name} survived {report.search.probes} probes"
    (found,) = report.search.findings
    assert not report.passed
    again = search_backend(f"planted:{name}", tokens=[found.token])
    assert again.search is not None
    assert found.kind in [each.kind for each in again.search.findings]
    small = from_token(found.token)
    if name in WITHOUT_SIZES and found.status == "fail":
        assert small.height * small.width <= 8
        assert max(small.channels, small.value, small.qk) <= 8
        assert len(small.steps) <= 3


@pytest.mark.parametrize("name", QUICK)
def test_a_planted_bug_is_found_and_made_small(on_path, first_only, patient, name):
    caught(name, 30)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(planted.PLANTED) - set(QUICK)))
def test_every_planted_bug_is_found(on_path, first_only, patient, name):
    caught(name, 120)


@pytest.mark.parametrize("ask", ["together", "often", "worn"])
def test_many_calls_of_the_definition_are_right_and_those_of_a_bug_are_not(ask):
    probe = Probe(steps=(Step("training_pass"), Step(ask), Step("params")), norm=True, bias=False, value=3)
    assert findings(probe, ask_steps(Reference(), probe)) == ()
    bugs = {"together": planted.OneScratch, "often": planted.RarelyWrong, "worn": planted.WearsOut}
    found = findings(probe, ask_steps(bugs[ask](), probe))
    assert {each.ask for each in found} == {ask}


def test_what_only_another_process_shows_is_told(on_path, tmp_path, monkeypatch, patient):
    monkeypatch.setenv("PLANTED_STARTED", str(tmp_path / "started"))
    report = search_backend("planted:RightInOneProcess", seconds=PATIENCE)
    assert report.search is not None, report.error
    assert {found.property for found in report.search.findings} == {"equal answers in another process"}
    assert not report.passed


def test_a_backend_has_its_processes(on_path):
    report = search_backend("planted:OverProcesses", tokens=[to_token(Probe())])
    assert report.search is not None, report.error
    assert report.search.findings == ()


def test_the_right_layer_is_left_alone(on_path, patient):
    report = search_backend("planted:Right", seconds=5 * PATIENCE)
    assert report.search is not None
    assert report.search.findings == ()
    assert report.passed
    assert report.search.probes > 20
    assert report.level is None, "a search is no level"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("DiesOfRows", "the process exited with code 3"),
        ("HangsOfRows", "the process was ended after 2 s"),
        ("RaisesOfRows", "RuntimeError: no such rows"),
        ("GrowsAnswers", "y of shape (1024, 1024, 1024)"),
    ],
)
def test_a_run_without_an_answer_is_an_error_and_the_search_goes_on(on_path, name, words):
    rows = to_token(Probe(height=1, width=9, batch=3))
    report = search_backend(f"planted:{name}", tokens=[rows, to_token(Probe())], timeout=2)
    assert report.search is not None
    (found,) = report.search.findings
    assert words in found.message
    assert found.token == rows


@pytest.mark.slow
def test_a_flaky_backend_is_told_as_flaky(on_path):
    report = search_backend("planted:SometimesWrong", seconds=60)
    assert report.search is not None
    flaky = [found for found in report.search.findings if found.status == "flaky"]
    assert flaky
    assert "the same run had two answers, one of them wrong" in flaky[0].message


def test_past_failures_come_first(on_path, tmp_path):
    found = to_token(Probe(steps=(Step("vjp"), Step("map")), channels=5, value=5))
    past = PastFailures(tmp_path / "failures.txt")
    past.add({"planted:MapOverwrites": [found], "torch": [to_token(Probe())]})
    assert past.of("torch") == (to_token(Probe()),)
    report = search_backend("planted:MapOverwrites", seconds=1, past=past.of("planted:MapOverwrites"))
    assert report.search is not None
    assert report.search.findings[0].token == found


def test_a_file_of_failures_keeps_what_is_not_ours(tmp_path):
    path = tmp_path / "failures.txt"
    theirs = "# of the release in May\nmine:Backend S0:old:00\n\ntorch S1::97fb"
    path.write_text(theirs, encoding="utf-8")
    past = PastFailures(path)
    before = path.stat()
    past.add({"torch": ["S1::97fb"], "mine:Backend": []})
    assert path.stat() == before, "not written again"
    past.add({"torch": ["S1::97fb", "S1:gamma=-6.0:11e6"]})
    assert path.read_text(encoding="utf-8") == f"{theirs}\ntorch S1:gamma=-6.0:11e6\n"
    path.write_text("a-line-without-a-token\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 is 'a-line-without-a-token', expected a backend, a space"):
        past.of("torch")


def test_skipped_past_failures_are_told(on_path):
    told: list[str] = []
    mixed = to_token(Probe(steps=(Step("mixed"),)))
    report = search_backend("planted:ForwardOnly", seconds=1, past=["S0:old:00", mixed], tell=told.append)
    assert report.search is not None
    assert [(each.token, each.why) for each in report.search.skipped] == [
        ("S0:old:00", "stale"),
        (mixed, "unclaimed"),
    ]
    assert "got a token of version 0" in told[0]
    assert told[1] == f"skipped {mixed}: unclaimed: the backend does not claim mixed"


def test_past_failures_that_hang_end_the_search(on_path):
    past = [to_token(Probe(height=1, width=9 + more)) for more in range(5)]
    report = search_backend("planted:HangsOfRows", seconds=60, past=past, timeout=1)
    assert report.search is not None
    assert report.search.probes == 3
    assert report.search.ended == "gave up"


def test_failures_without_an_answer_do_not_explain_each_other(on_path):
    past = [to_token(Probe(height=1, width=9)), to_token(Probe(batch=3))]
    report = search_backend("planted:DiesAndGrows", seconds=0.1, past=past)
    assert report.search is not None
    assert [found.property for found in report.search.findings][:2] == ["crash", "answers are arrays"]


class InProcess:
    """A backend in this process, and an exception instead of one answer."""

    def __init__(self, backend, stop: BaseException | None = None, *, wrong: int = -1, at: int = -1) -> None:
        self.backend, self.stop, self.wrong, self.at = backend, stop, wrong, at
        self.asked = self.failed = 0

    def start(self) -> Ready:
        return Ready({}, (), CLAIMS, {})

    def ask(self, probe: Probe) -> Answers:
        self.asked += 1
        answers = ask_steps(self.backend, probe)
        self.failed += bool(findings(probe, answers))
        if self.stop is not None and (self.asked == self.at or self.failed == self.wrong):
            raise self.stop
        return answers

    def end(self) -> None:
        pass


@pytest.mark.parametrize(
    ("stop", "code"), [(KeyboardInterrupt(), 0), (SystemExit(143), 143), (SystemExit(129), 129)]
)
def test_what_stops_a_search_is_no_failure_of_a_probe(stop, code):
    process = InProcess(Reference(), stop, at=5)
    search = explore.explore(process, seconds=60)
    assert (process.asked, search.findings, search.ended, search.exit_code) == (5, (), "interrupt", code)


@pytest.mark.parametrize("wrong", [2, 3, 6])
@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)])
def test_a_failure_that_is_being_made_smaller_is_kept(stop, wrong):
    process = InProcess(planted.TransposesSquares(), stop, wrong=wrong)
    search = explore.explore(process, seconds=60)
    assert process.failed == wrong
    assert search.ended == "interrupt"
    (found,) = search.findings
    assert findings(from_token(found.token), ask_steps(planted.TransposesSquares(), from_token(found.token)))


def test_a_signal_while_a_probe_is_drawn_ends_the_search(monkeypatch):
    draws = iter(range(1000))

    def drawn_until(*arguments, **options):
        if next(draws) == 9:
            raise SystemExit(143)
        return drawn(*arguments, **options)

    monkeypatch.setattr("selfattn_core.conformance.search.strategies.drawn", drawn_until)
    process = InProcess(Reference())
    search = explore.explore(process, seconds=60)
    assert (search.ended, search.exit_code) == ("interrupt", 143)
    assert process.asked <= 12


def test_a_bug_of_the_kit_is_not_taken_for_one_of_the_backend():
    process = InProcess(Reference(), ZeroDivisionError("in the kit"), at=5)
    with pytest.raises(ZeroDivisionError, match="in the kit"):
        explore.explore(process, seconds=60)
    assert process.asked == 5


def test_a_backend_that_does_not_start_again_ends_the_search(on_path, tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED_STARTED", str(tmp_path / "started"))
    report = search_backend("planted:StartsOnce", seconds=30)
    assert report.search is not None, report.error
    assert [found.property for found in report.search.findings] == ["definition", "starts again"]
    assert "the device is taken" in report.search.findings[1].message
    assert report.search.ended == "gave up"


def test_a_random_failure_is_told_once(patient):
    process = InProcess(planted.OftenWrong())
    search = explore.explore(process, seed=1, seconds=4 * PATIENCE)
    assert process.failed > 3
    assert [(found.status, found.quantity) for found in search.findings] == [("flaky", "y")]


def test_a_replay_parts_what_is_flaky_from_what_fails(monkeypatch):
    def found(quantity):
        return explore.Finding("definition", "vjp", quantity, f"{quantity} is wrong")

    shown = iter([(found("x"), found("gamma")), (found("x"), found("key.kernel"))])
    monkeypatch.setattr(explore, "findings", lambda *_: next(shown))
    search = explore.replay(InProcess(Reference()), [to_token(Probe())])
    assert {each.quantity: each.status for each in search.findings} == {
        "x": "fail",
        "gamma": "flaky",
        "key.kernel": "flaky",
    }


def test_every_property_that_the_smallest_probe_violates_is_told(patient):
    search = explore.explore(InProcess(planted.WritesAndErrs()), seconds=3 * PATIENCE)
    told = {found.property: found.token for found in search.findings if found.ask == "forward"}
    assert set(told) == {"definition", "arguments untouched"}
    assert told["definition"] == told["arguments untouched"]


def test_arrays_that_are_wrong_in_one_call_are_told_together(patient):
    search = explore.explore(InProcess(planted.SmallGradients()), seed=6, seconds=4 * PATIENCE)
    assert any("; likewise " in found.message for found in search.findings)
    assert len({(found.property, found.ask) for found in search.findings}) == len(search.findings)


def test_a_long_search_tells_how_far_it_is(monkeypatch):
    monkeypatch.setattr(explore, "_TELL_SECONDS", 0.0)
    told: list[str] = []
    explore.explore(InProcess(Reference()), seconds=0.5, tell=told.append)
    assert "probes asked in" in told[0]


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_search_needs_a_time(seconds):
    with pytest.raises(ValueError, match="expected a positive number of seconds"):
        explore.explore(InProcess(Reference()), seconds=seconds)


@pytest.mark.parametrize(
    ("probe", "why"),
    [
        (Probe(steps=(Step("vjp"),)), "unclaimed: the backend does not claim vjp"),
        (Probe(norm=True), "unclaimed: the backend does not claim spectral_norm"),
        (Probe(dtype="bfloat16"), "unclaimed: the backend does not claim bfloat16"),
        (Probe(pool=2, rows="equal"), "undecided: "),
    ],
)
def test_a_replay_without_a_judged_answer_does_not_pass(on_path, probe, why):
    report = search_backend("planted:ForwardOnly", tokens=[to_token(probe)])
    assert report.search is not None
    assert report.search.findings == ()
    assert not report.passed
    assert f"skipped {to_token(probe)}: {why}" in as_table(as_data([report], seed=0))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.parametrize("batch", [1, 2])
def test_a_child_of_the_backend_does_not_hold_up_the_end(on_path, batch):
    began = time.monotonic()
    report = search_backend("planted:LeavesChild", tokens=[to_token(Probe(batch=batch))])
    assert report.search is not None
    assert report.search.findings == ()
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 1, 3), (2, 3, 4, 1), (2, 1, 1, 3), (2, 3, 4, 5)])
@pytest.mark.parametrize("view", ["", "strided", "transposed", "reversed", "still"])
def test_a_view_is_never_the_memory_of_the_kit(view, shape):
    maps = np.ones(shape) if view == "still" else np.random.default_rng(2).standard_normal(shape)
    found = viewed(maps, view)
    assert not np.shares_memory(found, maps)
    np.testing.assert_array_equal(found, maps)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda token: token.replace("S1:", "S2:"),
            "got a token of version 2, expected version 1: replay it with",
        ),
        (lambda token: token[:-1], "a part is missing or was changed, so copy the whole token"),
        (lambda token: token.replace("=5", "=6", 1), "its check sum is"),
        (lambda _: "SA-FWD-001", "expected S1:NAME=VALUE,…:SUM, as --explore prints it"),
        (lambda _: "", "expected S1:NAME"),
    ],
)
def test_a_token_that_cannot_be_replayed_says_why(spoil, words):
    token = spoil(to_token(Probe(channels=5, value=5)))
    with pytest.raises(TokenError, match=None) as caught_error:
        from_token(token)
    assert words in str(caught_error.value)


def summed(content: str) -> str:
    from selfattn_core.conformance.search import token

    return f"{content}:{token._sum(content)}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("S1:colour=red", "unknown name 'colour'"),
        ("S1:channels=many", "channels=many"),
        ("S1:norm=2", "expected 0 or 1"),
        ("S1:rows=odd", "expected one of equal, repeated, integers, positive"),
        ("S1:steps=forward+telepathy", "unknown step 'telepathy'"),
        ("S1:channels=9999999", "expected at most 1048576"),
        ("S1:other=1x2", "expected three sizes"),
        ("S1:batch=-1", "a size is negative"),
        ("S1:channels=0,value=0", "channels=0 must be a positive integer"),
        ("S1:pool=3", "smaller than one 3×3 pooling window"),
    ],
)
def test_a_token_that_makes_no_probe_says_why(content, words):
    with pytest.raises(TokenError) as caught_error:
        from_token(summed(content))
    assert words in str(caught_error.value)


def test_a_token_carries_every_field():
    plain = Probe()
    for field in fields(Probe):
        value = getattr(plain, field.name)
        other = {
            "steps": (Step("vjp", "input"), Step("map", "layer")),
            "other": (3, 5, 4),
            "dtype": "float64",
            "layout": "channels_first",
            "rows": "integers",
            "x_view": "reversed",
            "dy_view": "still",
            "state": "random",
            "zero": "query",
            "poison": "dy",
            "out": True,
            "channels": 3,
            "value": 3,
        }.get(
            field.name,
            not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else -2.5,
        )
        changed = replace(plain, **{field.name: other})
        assert from_token(to_token(changed)) == changed
    assert {step.ask for step in from_token(to_token(Probe(steps=tuple(map(Step, ASKS[:12]))))).steps} == set(
        ASKS[:12]
    )


def test_the_simplest_choices_make_the_simplest_probe():
    probe = drawn(lambda choices: choices[0], CLAIMS)
    assert probe.shape == (1, 1, 1)
    assert probe.steps == (Step("forward"),)


@pytest.fixture(scope="module")
def found_data():
    found = explore.Finding(
        "definition", "vjp", "x", "x: error <b>", "fail", to_token(Probe()), Probe().words, 12
    )
    search = explore.Search(3, 4.5, 600, 12, 30, (found,), "time")
    report = explore_report(search)
    return as_data([report], seed=3)


def explore_report(search):
    from selfattn_core.conformance.results import BackendReport

    return BackendReport("mine", {"lib": "1"}, ("forward",), ("channels_last",), ("float32",), search=search)


def test_every_form_of_the_report_has_the_token(found_data):
    jsonschema.validate(json.loads(json.dumps(found_data, allow_nan=False)), schema())
    command = f"selfattn conform mine --replay {to_token(Probe())}"
    for form in (as_table, as_html, as_junit, as_markdown):
        text = form(found_data)
        assert command in text, form
        assert "12 probes with 30 calls" in text, form
        assert "conformant at" not in text, "a search says nothing about levels"
    assert "<b>" not in as_html(found_data)
    assert found_data["backends"][0]["passed"] is False


def selfattn(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "selfattn_core", "conform", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_the_command(on_path, tmp_path):
    failures, report = tmp_path / "failures.txt", tmp_path / "report.json"
    bad = selfattn(
        "planted:WritesAndErrs",
        "--explore",
        "5",
        "--failures",
        str(failures),
        "--json",
        str(report),
        cwd=tmp_path,
    )
    assert bad.returncode == 1, bad.stderr
    token = failures.read_text(encoding="utf-8").split()[1]
    assert f"selfattn conform planted:WritesAndErrs --replay {token}" in bad.stdout
    assert "arguments untouched" in bad.stdout
    assert (
        json.loads(report.read_text(encoding="utf-8"))["backends"][0]["search"]["findings"][0]["token"]
        == token
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["failures.txt", "report.json"], "nothing else"
    again = selfattn("planted:WritesAndErrs", "--replay", token)
    assert again.returncode == 1
    assert "it repeated tokens, and found" in again.stdout
    right = selfattn("planted:Right", "--replay", token)
    assert right.returncode == 0, right.stdout
    assert "found nothing" in right.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--explore"], "--explore: name the BACKEND that should answer"),
        (["planted:Right", "--replay", "S9:x:00"], "got a token of version 9, expected version 1"),
        (["planted:Right", "--explore", "--case", "SA-FWD-001"], "run different things: pass one of them"),
        (["planted:Right", "--failures", "f.txt"], "only a search reads it: pass --explore too"),
        (["planted:Right", "--explore", "0"], "0.0 is not in the range x>0"),
        (["planted:Right", "--explore", "nan"], "got nan, expected a positive number of seconds, such as 60"),
        (["planted:Right", "--explore", "inf"], "got inf, expected a positive number of seconds, such as 60"),
        (["--explore", "torch"], "write BACKEND before --explore, or --explore=60"),
        (["--diff", "a.json", "b.json", "--failures", "f.txt"], "--diff compares two files and runs nothing"),
        (["--diff", "a.json", "b.json", "--generated", "3"], "--diff compares two files and runs nothing"),
    ],
)
def test_wrong_usage(arguments, words):
    result = selfattn(*arguments)
    assert result.returncode == 2
    assert words in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent/f.txt", "--failures absent/f.txt: there is no folder absent"),
        (".", "--failures .: is a folder, where a file is expected"),
        ("bad.txt", "--failures bad.txt: line 1 is 'nothing', expected a backend, a space and a token"),
        ("report.json", "--json and --failures cannot all go to"),
        (os.devnull, "is a device or a pipe, expected a file that keeps its lines"),
    ],
)
def test_a_file_of_failures_is_checked_first(tmp_path, name, words):
    (tmp_path / "bad.txt").write_text("nothing\n", encoding="utf-8")
    result = selfattn(
        "planted:Right",
        "--explore",
        "600",
        "--failures",
        name,
        "--json",
        "report.json",
        cwd=tmp_path,
        timeout=60,
    )
    assert result.returncode == 2
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]


def test_a_file_of_failures_that_breaks_does_not_lose_the_report(on_path, tmp_path):
    """The file is damaged while the search runs."""
    past = tmp_path / "failures.txt"
    command = [sys.executable, "-m", "selfattn_core", "conform", "planted:WritesAndErrs", "--explore", "4"]
    with subprocess.Popen(
        [*command, "--failures", str(past)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert next(line for line in process.stderr if "probes asked" not in line)
        past.write_text("nothing\n", encoding="utf-8")
        shown, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "--replay S1:" in shown
    assert past.read_text(encoding="utf-8") == "nothing\n"


def test_what_an_interrupted_search_found_is_told(on_path):
    """A shell that runs tests in the background makes processes ignore SIGINT."""
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from selfattn_core.cli import main; main(prog_name='selfattn')"
    )
    command = [sys.executable, "-c", script, "conform", "planted:WritesAndErrs", "--explore", "600"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert next(line for line in process.stderr if "probes asked" not in line)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        shown, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "it was interrupted, and found" in shown
    assert "--replay S1:" in shown
    assert "Traceback" not in told


def test_without_hypothesis_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr("selfattn_core.installed.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'selfattn\[search\]'"):
        probes(CLAIMS)


def test_a_backend_that_does_not_start(on_path):
    report = search_backend("planted:NoSuchClass", seconds=1)
    assert report.refused
    assert "has no 'NoSuchClass'" in report.error
    assert not report.passed


def test_numbers_have_the_ranges_of_the_probe():
    large = material(Probe(x_scale=10, dy_scale=16, gamma=-6.0))
    assert 2**9 < np.abs(large.x[0]).mean() < 2**11
    assert 2**15 < np.abs(large.dy[0]).mean() < 2**17
    assert large.layers[0]["gamma"] == -6
    still = material(Probe(dy_view="still", dy_scale=4)).dy[0]
    assert (still == 16).all()
    zero = material(Probe(norm=True, zero="all", channels=4, value=4)).layers[0]
    assert not any(zero[f"{name}.kernel"].any() for name in ("query", "key", "value"))
