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
from selfattn_core.conformance.reference import Reference
from selfattn_core.conformance.report import as_data, as_html, as_junit, as_markdown, as_table, schema
from selfattn_core.conformance.search import explore
from selfattn_core.conformance.search.asking import ask_steps
from selfattn_core.conformance.search.drawing import drawn
from selfattn_core.conformance.search.judging import findings, worst
from selfattn_core.conformance.search.material import material
from selfattn_core.conformance.search.past import PastFailures
from selfattn_core.conformance.search.probe import ASKS, Probe, Step
from selfattn_core.conformance.search.run import search_backend
from selfattn_core.conformance.search.strategies import probes
from selfattn_core.conformance.search.token import TokenError, from_token, to_token
from tests.conformance import planted

CLAIMS = Claims({*Reference().claims(), "updated"}, Reference().layouts(), Reference().dtypes())

QUICK = (
    "TransposesSquares",
    "third_block",
    "OwnParams",
    "StillGradient",
    "clamped_gamma",
    "BeginsAnew",
    "MapOverwrites",
)
"""Planted bugs that are found within seconds, one of each kind. The others are slow."""

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

    @hypothesis.seed(5)
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
    asked = some_probes(60)
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


@pytest.fixture
def first_only(monkeypatch):
    monkeypatch.setattr(explore, "_MOST_FINDINGS", 1)


def caught(name: str, seconds: float) -> None:
    report = search_backend(f"planted:{name}", seconds=seconds)
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
def test_a_planted_bug_is_found_and_made_small(on_path, first_only, name):
    caught(name, 30)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(planted.PLANTED) - set(QUICK)))
def test_every_planted_bug_is_found(on_path, first_only, name):
    caught(name, 120)


def test_the_right_layer_is_left_alone(on_path):
    report = search_backend("planted:Right", seconds=5)
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


def test_a_flaky_backend_is_told_as_flaky(on_path):
    report = search_backend("planted:SometimesWrong", seconds=60)
    assert report.search is not None
    flaky = [found for found in report.search.findings if found.status == "flaky"]
    assert flaky
    assert "the same run had two answers, one of them wrong" in flaky[0].message


def test_past_failures_come_first(on_path, tmp_path):
    found = to_token(Probe(steps=(Step("vjp"), Step("map")), channels=5, value=5))
    path = tmp_path / "failures.txt"
    past = PastFailures()
    past.add("planted:MapOverwrites", [found])
    past.add("torch", [to_token(Probe())])
    past.write(path)
    again = PastFailures.read(path)
    assert again == past
    report = search_backend("planted:MapOverwrites", seconds=1, past=again.of("planted:MapOverwrites"))
    assert report.search is not None
    assert report.search.findings[0].token == found
    path.write_text("a-line-without-a-token\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 is 'a-line-without-a-token', expected a backend, a space"):
        PastFailures.read(path)


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
        "planted:OwnParams",
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
    assert f"selfattn conform planted:OwnParams --replay {token}" in bad.stdout
    assert "weights are copies" in bad.stdout
    assert (
        json.loads(report.read_text(encoding="utf-8"))["backends"][0]["search"]["findings"][0]["token"]
        == token
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["failures.txt", "report.json"], "nothing else"
    again = selfattn("planted:OwnParams", "--replay", token)
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
    ],
)
def test_wrong_usage(arguments, words):
    result = selfattn(*arguments)
    assert result.returncode == 2
    assert words in " ".join(result.stderr.replace("│", " ").split())


def test_what_an_interrupted_search_found_is_told(on_path):
    """A shell that runs tests in the background makes processes ignore SIGINT."""
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from selfattn_core.cli import main; main(prog_name='selfattn')"
    )
    command = [sys.executable, "-c", script, "conform", "planted:OwnParams", "--explore", "600"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "weights are copies" in line
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
