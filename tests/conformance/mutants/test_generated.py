"""Generated mutants are derived alike every time, are caught or told, and cannot stop the command."""

import ast
import inspect

import pytest
from click.testing import CliRunner

from selfattn_core import spec
from selfattn_core.cli import main
from selfattn_core.conformance.mutants.generated import asked, selftest
from selfattn_core.conformance.mutants.generated.derive import GeneratedMutant, choose, derived
from selfattn_core.conformance.mutants.generated.equivalent import LIST, equivalents
from selfattn_core.conformance.mutants.generated.rules import RULES
from selfattn_core.conformance.mutants.generated.selftest import (
    SOURCES,
    GeneratedKill,
    mutants_of,
    run_mutants,
    summary,
)
from selfattn_core.conformance.search.asking import ask_steps
from selfattn_core.conformance.search.judging import findings
from selfattn_core.conformance.search.token import from_token
from tests.conformance import planted

SPEC = mutants_of("spec")
LINE = "return layer.unflatten(layer.store(layer.gamma * layer.z + layer.x))"


def mutant(old: str, new: str) -> GeneratedMutant:
    source = inspect.getsource(spec)
    assert source.count(old) == 1
    return GeneratedMutant("selfattn_core.spec", "f", "operator", 1, old, new, source.replace(old, new))


def verdicts(monkeypatch, *mutants: GeneratedMutant) -> list[GeneratedKill]:
    monkeypatch.setattr(selftest, "mutants_of", lambda _: mutants)
    monkeypatch.setattr(selftest, "equivalents", lambda *_: {})
    return run_mutants("spec", len(mutants), probes=5)


def test_every_rule_finds_places_and_every_mutant_is_one_change():
    assert {each.rule for each in SPEC} == set(RULES)
    assert len({each.source for each in SPEC}) == len(SPEC) > 400
    for each in choose(SPEC, 40):
        assert ast.dump(ast.parse(each.source)) != ast.dump(ast.parse(inspect.getsource(spec)))
        assert each.old != each.new
        assert f"- {each.old.splitlines()[0]}" in each.difference


def test_refusals_texts_and_what_no_answer_needs_stay():
    source = '''
def kept(a: int = 1 + 1) -> int:
    """1 + 1"""
    if a - 1:
        raise ValueError(f"{a + 1}")
    return a
def left_out(a):
    return a + 1
'''
    assert derived("toy", source, without=("left_out",)) == ()
    assert {each.new for each in derived("toy", source)} > {"return (a - 1)", "return a", "return a + 2"}
    assert not any(each.function == "magnitudes" for each in SPEC)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a[1:n]", "a[1:n + 1]"),
        ("a.sum(axis=-1)", "a.sum(axis=-2)"),
        ("a.sum(axis=(0, 1))", "a.sum(axis=0)"),
        ("a + b", "b"),
        ("a + b", "a.__iadd__(b)"),
        ("f(a)", "a"),
        ("a @ b", "(b @ a)"),
        ("a == b", "(a != b)"),
        ("range(0, n, 4)", "range(0, n + 1, 4)"),
        ("a if b else c", "c"),
        ("-a", "a"),
        ("True", "False"),
    ],
)
def test_the_rules(old, new):
    found = derived("toy", f"def g(a, b, c, n):\n    return {old}\n")
    assert f"return {new}" in {each.new for each in found}


def test_a_choice_depends_on_the_seed_alone():
    assert choose(SPEC, 20, 3) == choose(mutants_of("spec"), 20, 3)
    assert choose(SPEC, 20, 3) != choose(SPEC, 20, 4)
    assert choose(SPEC, 10**6) == SPEC


def test_wrong_answers_crashes_and_survivors(monkeypatch):
    wrong = mutant(LINE, LINE.replace("+ layer.x", "- layer.x"))
    broken = mutant(LINE, LINE.replace("layer.gamma", "layer.missing"))
    leaves = mutant(LINE, "import os; os._exit(0)")
    same = mutant(LINE, LINE.replace("layer.gamma * layer.z", "layer.z * layer.gamma"))
    kills = verdicts(monkeypatch, wrong, broken, leaves, same)
    assert [kill.how for kill in kills] == ["wrong answer", "exception", "hang", ""]
    assert kills[0].run.startswith("SA-")
    text = summary("spec", kills)
    assert "3 of 4 mutants caught, 75.0 % (1 by exception, 1 by hang, 1 by wrong answer)" in text
    assert f"survived: {same.difference}" in text


def test_one_that_loops_for_ever_or_fills_the_memory_ends(monkeypatch):
    monkeypatch.setattr(selftest, "_SECONDS", 5.0)
    loops = mutant(LINE, f"while True: pass\n    {LINE}")
    fills = mutant(LINE, f"np.ones((2**20, 2**20))\n    {LINE}")
    right = mutant(LINE, LINE.replace("+ layer.x", "- layer.x"))
    kills = verdicts(monkeypatch, loops, fills, right)
    assert [kill.how for kill in kills] == ["hang", "exception", "wrong answer"]
    assert "MemoryError" in kills[1].message


def test_equivalent_ones_do_not_count(monkeypatch):
    same = mutant(LINE, LINE.replace("layer.gamma * layer.z", "layer.z * layer.gamma"))
    monkeypatch.setattr(selftest, "mutants_of", lambda _: (same,))
    monkeypatch.setattr(selftest, "equivalents", lambda *_: {same: "A product has no order."})
    assert summary("spec", run_mutants("spec", 1, probes=5)).startswith(
        "generated from spec: 0 of 0 mutants caught, 0.0 % (none); 1 more compute the same"
    )


@pytest.mark.parametrize("name", SOURCES)
def test_every_entry_of_the_list_fits_a_mutant(name):
    found = equivalents(mutants_of(name), SOURCES[name].modules)
    assert all(reason.endswith(".") for reason in found.values())


def test_a_stale_entry_and_one_without_a_reason_are_told(tmp_path):
    entry = '[[equivalent]]\nmodule = "selfattn_core.spec"\nfunction = "forward"\nold = {}\nnew = {}\nreason = {}\n'
    file = tmp_path / "equivalent.toml"
    file.write_text(entry.format('"no such line"', '"x"', '"It is."'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"fits no generated mutant.*the source has changed"):
        equivalents(SPEC, ("selfattn_core.spec",), file)
    assert equivalents(SPEC, ("another",), file) == {}
    known = next(each for each in SPEC if each.function == "forward")
    file.write_text(entry.format(f"'''{known.old}'''", f"'''{known.new}'''", '""'), encoding="utf-8")
    with pytest.raises(ValueError, match="has no reason"):
        equivalents(SPEC, ("selfattn_core.spec",), file)
    assert LIST.exists()


def test_a_source_that_fails_unchanged_says_nothing_about_mutants(monkeypatch, tmp_path):
    broken = tmp_path / "spec.py"
    broken.write_text(inspect.getsource(spec).replace(LINE, LINE.replace("+ layer.x", "- layer.x")), "utf-8")
    monkeypatch.setattr(selftest, "_path", lambda _: broken)
    with pytest.raises(
        selftest.UnusableError, match=r"unchanged source of selfattn_core.spec fails here: SA-"
    ):
        verdicts(monkeypatch, mutant(LINE, f"{LINE} "))


def test_one_that_is_caught_and_marked_is_told(monkeypatch):
    wrong = mutant(LINE, LINE.replace("+ layer.x", "- layer.x"))
    monkeypatch.setattr(selftest, "mutants_of", lambda _: (wrong,))
    monkeypatch.setattr(selftest, "equivalents", lambda *_: {wrong: "It was thought to be."})
    told = summary("spec", run_mutants("spec", 1, probes=5))
    assert f"caught, but marked as computing the same (It was thought to be.): {wrong.difference}" in told


def test_the_command_tells_the_rate(monkeypatch):
    monkeypatch.setattr("selfattn_core.conformance.mutants.selftest.MUTANTS", ())
    result = CliRunner().invoke(main, ["conform", "--self-test", "--generated", "2"])
    assert result.exit_code == 0, result.output
    assert "generated from spec: " in result.output
    alone = CliRunner().invoke(main, ["conform", "--generated", "2"])
    assert alone.exit_code == 2
    assert "it is a part of --self-test" in alone.output


def test_adapters_are_asked_for_large_maps_too():
    small, large = asked._table(large=False), asked._table(large=True)
    assert set(small) < set(large)
    assert {run.case.id for run in large} - {run.case.id for run in small} >= {"SA-VJP-024", "SA-FWD-026"}
    assert "memory" not in {run.case.family for run in large}


def test_a_mutant_that_the_table_does_not_catch_is_searched(monkeypatch):
    monkeypatch.setattr(asked, "_table", lambda _: [])
    assert asked.first_failure(planted.Right(), probes=40) is None
    caught = asked.first_failure(planted.TransposesSquares(), probes=200)
    assert caught is not None
    assert caught.how == "wrong answer"
    probe = from_token(caught.run)
    assert findings(probe, ask_steps(planted.TransposesSquares(), probe))
    assert not findings(probe, ask_steps(planted.Right(), probe))


def test_a_probe_that_raises_is_a_failure(monkeypatch):
    monkeypatch.setattr(asked, "_table", lambda _: [])
    caught = asked.first_failure(planted.RaisesOfRows(), probes=300)
    assert caught is not None
    assert caught.how == "exception"
