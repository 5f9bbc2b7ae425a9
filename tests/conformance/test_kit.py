"""The kit finds what is wrong with a backend and nothing wrong with a right one; the command says so."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from selfattn_core import spec
from selfattn_core.conformance.cases.inputs import Inputs, _decided, inputs, rounded
from selfattn_core.conformance.cases.run import Run, all_runs
from selfattn_core.conformance.cases.table import CASES, FAMILIES, LEVELS, needs
from selfattn_core.conformance.execution.runner import run_backend
from selfattn_core.conformance.mutants import edited
from selfattn_core.conformance.mutants.selftest import judge_in_process, small_runs
from selfattn_core.conformance.mutants.sixteen_bits import InBfloat16
from selfattn_core.conformance.protocol import REGISTRY, resolve
from selfattn_core.conformance.questions.ask import answers
from selfattn_core.conformance.questions.peak_memory import PeakUnknownError, peak_growth
from selfattn_core.conformance.reference import Reference
from selfattn_core.conformance.report import as_data, as_table
from selfattn_core.conformance.results import BackendReport, Outcome
from selfattn_core.conformance.verdicts.compare import compare
from selfattn_core.conformance.verdicts.expected import _terms, expect
from selfattn_core.conformance.verdicts.tolerance import CAPS, EPS, FACTOR, FACTORS, judge

HERE = Path(__file__).parent
ASKED = ("forward", "map", "vjp", "r1", "params")
FEW = [
    run
    for run in all_runs()
    if run.case.id.endswith(("-001", "-002")) and run.layout == "channels_last" and run.case.family in ASKED
]


@pytest.fixture
def on_path(monkeypatch):
    """As if toy_backends were a package somebody has installed."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])))
    monkeypatch.syspath_prepend(HERE)


def test_ids_are_unique_and_every_family_is_there():
    assert len({case.id for case in CASES}) == len(CASES)
    assert {case.family for case in CASES} == set(FAMILIES)
    assert sorted(family for families in LEVELS.values() for family in families) == sorted(FAMILIES)
    assert {case.id[:6] for case in CASES if case.family == "vjp"} == {"SA-VJP"}


def described(case) -> str:
    """A case as a line; what it has beyond the fields of every case stands at the end."""
    line = (
        f"{case.id} {case.family} {_options(case.config)} {case.shape} "
        f"gamma {case.gamma} logits {case.logits} {'constant ' if case.constant else ''}: {case.title}"
    )
    further = {
        field.name: getattr(case, field.name)
        for field in dataclasses.fields(case)[8:]
        if getattr(case, field.name) != field.default
    }
    return " ".join([line, *(f"[{name} {value}]" for name, value in further.items())])


def test_cases_are_frozen():
    """Ids, layers and sizes are what reports of different versions are compared by."""
    listing = "\n".join(described(case) for case in CASES)
    assert listing + "\n" == (HERE / "golden_cases.txt").read_text(encoding="utf-8")


def _options(config):
    """The values of a config; that of spectral_norm, an option younger than the first cases, only where it is True."""
    values = tuple(config.to_dict().values())
    return values if config.spectral_norm else values[:-1]


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.shape == (2, 5, 7)], ids=lambda case: case.id
)
def test_inputs_can_see_bugs(case):
    given = inputs(case, "float64")
    batch, height, width, channels = given.x.shape
    assert len({batch, height, width, channels, case.config.qk_channels}) >= 4
    zero = {name for name, array in given.params.items() if not array.any()}
    assert zero == {f"{role}.kernel" for role in case.zero} | ({"gamma"} if case.gamma == 0 else set())
    if not case.constant and not {"query", "key"} & set(case.zero):
        assert spec.attention_map(case.config, given.params, given.x).max() > 0.3
    again = inputs(case, "float64")
    assert given.x.tobytes() == again.x.tobytes()
    assert given.x.tobytes() != inputs(case, "float64", seed=1).x.tobytes()


def test_no_pooling_window_of_an_input_is_decided_by_rounding():
    """Two right backends would send its gradient to different positions."""
    case = next(case for case in CASES if case.config.kv_pool == 2 and case.shape == (2, 5, 7))
    clear = inputs(case, "float64")
    assert _decided(case, clear)
    near = clear.x.copy()
    near[1, 2, 3] = near[1, 2, 2] * (1 + 1e-6)
    tied = Inputs(clear.params, near, clear.dy)
    windows = (near @ clear.params["value.kernel"])[1, 2:4, 2:4].reshape(4, -1)
    assert set(windows.argmax(axis=0)) & {0, 1}, (
        "the two nearly equal positions should be the largest somewhere"
    )
    assert not _decided(case, tied)
    draws = iter([tied, clear])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selfattn_core.conformance.cases.inputs._draw", lambda *_: next(draws))
        assert inputs(case, "float64").x.tobytes() == clear.x.tobytes()


def test_equal_values_are_where_a_case_says_so():
    for case in (case for case in CASES if case.integers and case.family == "vjp"):
        given, side = inputs(case, "float32"), case.config.kv_pool
        values = (given.x @ given.params["value.kernel"])[:, :side, :side].reshape(
            given.x.shape[0], side**2, -1
        )
        largest = (values == values.max(axis=1, keepdims=True)).sum(axis=1)
        assert largest.max() > 1


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_inputs_of_sixteen_bits_are_exact_in_that_format(dtype, bits):
    case = next(case for case in CASES if case.family == "dtype")
    x = inputs(case, dtype).x
    assert x.dtype == np.float32
    mantissa, _ = np.frexp(x)
    assert (mantissa * 2**bits == np.rint(mantissa * 2**bits)).all()
    assert np.abs(x - inputs(case, "float32").x).max() <= np.abs(x).max() * 2.0**-bits
    if dtype == "float16":
        assert (x.astype(np.float16) == x).all()


def test_the_spec_is_conformant_with_itself():
    outcomes = list(
        judge_in_process(Reference(), [run for run in all_runs() if run.layout == "channels_last"])
    )
    assert [outcome.message for outcome in outcomes if outcome.status != "pass"] == []
    assert all(outcome.ratio == 0 for outcome in outcomes if outcome.run.dtype == "float64")
    assert 0 < max(outcome.ratio for outcome in outcomes if outcome.run.dtype == "float32") <= 1
    assert 0 < max(outcome.ratio for outcome in outcomes if outcome.run.dtype == "float16") <= 1
    assert {outcome.run.case.family for outcome in outcomes} == set(FAMILIES) - {"memory"}


def test_a_right_backend_need_not_cancel_exactly():
    """Kernels in blocks have D from rowsum(G∘o): where there is one key, they leave rounding errors of zero."""
    in_blocks = edited(
        "no bug: D from the output",
        "vjp",
        ("return _rowsum(self.A * dA)", "return _rowsum(G * self.o)"),
        (
            "dot_dS = A * (X - _rowsum(A * X))",
            "dot_dS = A * (X - _rowsum(dot_G * layer.o + first.G * self.dot_o))",
        ),
    ).make()
    runs = [run for run in small_runs(("vjp", "r1", "mixed")) if run.layout == "channels_last"]
    for seed in range(3):
        outcomes = list(judge_in_process(in_blocks, runs, seed))
        assert [outcome.message for outcome in outcomes if outcome.status != "pass"] == []
    single = [
        outcome for outcome in outcomes if outcome.run.case.title.endswith(("one position", "one pooled key"))
    ]
    assert (
        max(
            verdict.error
            for outcome in single
            for verdict in outcome.verdicts
            if verdict.quantity == "key.kernel"
        )
        > 0
    )


@pytest.mark.parametrize(
    "edits",
    [
        (),
        # As fused kernels have it: from an output and with factors of products that are rounded to 16 bits.
        (
            ("return _rowsum(self.A * dA)", "return _rowsum(G * self.o)"),
            (
                "self.dS = layer.A * (self.dA - self.D)",
                "self.dS = layer.store(layer.A * (self.dA - self.D)); layer.A = layer.store(layer.A)",
            ),
        ),
    ],
    ids=["in float32", "fused"],
)
def test_right_arithmetic_in_bfloat16_is_right(edits):
    runs = [run for run in small_runs(("dtype",)) if run.case.of == "vjp"]
    for seed in range(4):
        outcomes = list(judge_in_process(InBfloat16(*edits), runs, seed))
        assert [outcome.message for outcome in outcomes if outcome.status != "pass"] == []
    assert {outcome.run.dtype for outcome in outcomes} == {"bfloat16"}


def test_what_is_projected_from_integers_is_exact_in_16_bits():
    cases = [case for case in CASES if case.integers and case.family == "dtype"]
    assert {case.of for case in cases} == {"forward", "map", "vjp"}
    for case in cases:
        given = inputs(case, "bfloat16", 3)
        for role in ("query", "key", "value"):
            kernel, bias = given.params[f"{role}.kernel"], given.params.get(f"{role}.bias", np.float32(0))
            values = given.x @ kernel + bias
            assert (rounded(values, "bfloat16") == values).all()


def test_draws_that_16_bits_do_not_hold_are_drawn_again():
    case = next(case for case in CASES if case.integers and case.family == "dtype")
    good = inputs(case, "float64")
    draws = iter([dataclasses.replace(good, x=good.x * 100), good])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selfattn_core.conformance.cases.inputs._draw", lambda *_: next(draws))
        assert inputs(case, "float64").x.tobytes() == good.x.tobytes()


def test_sums_of_one_sign_grow_where_a_case_says_so():
    (case,) = (case for case in CASES if case.one_sign)
    given = inputs(case, "float64", 1)
    gradients = spec.vjp(case.config, given.params, given.x, given.dy)
    assert all((gradients[name] > 0).all() for name in ("gamma", "value.bias", "out.bias", "out.kernel"))


def test_views_hold_the_same_values_and_are_not_contiguous():
    cases = [case for case in CASES if case.view]
    assert {(case.family, case.view) for case in cases} == {
        (family, view) for family in ("forward", "vjp") for view in ("strided", "transposed")
    }
    seen = []

    class Sees(Reference):
        def forward(self, model, x):
            seen.append(x)
            return super().forward(model, x)

        def vjp(self, model, x, dy):
            seen.extend((x, dy))
            return super().vjp(model, x, dy)

    for case in cases:
        given = inputs(case, "float32")
        seen.clear()
        answers(Sees(), case, given, "float32", "channels_last")
        for got, want in zip(seen, (given.x, given.dy), strict=False):
            assert not got.flags.c_contiguous
            np.testing.assert_array_equal(got, want)
        assert len(seen) == (2 if case.family == "vjp" else 1)


@pytest.mark.parametrize("family", ["vjp", "r1"])
def test_what_vanishes_is_still_looked_at(family):
    """A thousandth of the terms that cancel is no rounding error."""
    case = next(case for case in CASES if case.family == family and case.title == "one pooled key")
    terms = _terms(case, inputs(case, "float64"))["query.kernel"]
    want = expect(case, "float32")["query.kernel"]
    assert not want.want.any()
    assert not judge(
        "query.kernel", np.full(want.want.shape, terms / 1000, np.float32), want, "float32"
    ).passed


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("family", ["forward", "vjp", "r1", "mixed"])
def test_the_cap_holds_whatever_the_floor(family, dtype):
    """A spec that were as noisy as you like could not hide an error beyond the cap."""
    case = next(case for case in CASES if case.family == family)
    name, expectation = next(iter(expect(case, dtype).items()))
    held = "float32" if dtype in ("float16", "bfloat16") else dtype

    def answer(error):
        got = (expectation.want + error).astype(held)
        return (got.view(np.uint32) & 0xFFFF0000).view(np.float32) if held != dtype else got

    noisy = dataclasses.replace(expectation, floor=np.inf)
    factor = FACTORS[dtype]
    if dtype in ("float32", "float64"):
        assert judge(name, answer(expectation.cap / 2), noisy, dtype).passed
    verdict = judge(name, answer(3 * expectation.cap), noisy, dtype)
    assert "above the hard cap" in verdict.message
    beyond = judge(name, answer(3 * factor * expectation.floor), expectation, dtype)
    assert f"× the noise floor, at most {factor:g} × is allowed" in beyond.message
    assert CAPS["forward"] < CAPS["vjp"] < CAPS["r1"]


def test_sixteen_bits_in_a_wider_format_are_refused():
    case = next(case for case in CASES if case.family == "dtype")
    want = expect(case, "bfloat16")["y"]
    assert "bfloat16 does not hold" in judge("y", want.want.astype(np.float32), want, "bfloat16").message


def test_nan_is_wanted_where_the_spec_has_it():
    case = next(case for case in CASES if case.family == "nonfinite")
    want = expect(case, "float32")["y"]
    assert np.isnan(want.want).any()
    assert np.isfinite(want.want).any()
    right = want.want.astype(np.float32)
    assert judge("y", right, want, "float32").passed
    assert "a number where NaN" in judge("y", np.nan_to_num(right), want, "float32").message
    assert "NaN or infinity where a number" in judge("y", right * np.nan, want, "float32").message


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


def test_an_exception_is_an_error_in_its_case_only(on_path):
    report = run_backend("toy_backends:Raises", runs=FEW)
    assert {outcome.status for outcome in report.outcomes if outcome.run.case.family == "forward"} == {
        "error"
    }
    assert {outcome.status for outcome in report.outcomes if outcome.run.case.family != "forward"} == {"pass"}
    assert "a bug in here" in as_table(as_data([report]))


def test_what_is_not_claimed_is_listed_as_such(on_path):
    report = run_backend("toy_backends:InferenceOnly", runs=FEW)
    assert report.passed
    unclaimed = {o.run.case.family for o in report.outcomes if o.status == "unclaimed"}
    assert unclaimed == set(ASKED) - {"forward"}
    assert as_table(as_data([report])).count("unclaimed") == len(ASKED) - 1


def test_levels_are_reached_by_what_is_claimed_and_passed(on_path):
    core = all_runs(level="core")
    forward_only = run_backend("toy_backends:InferenceOnly", runs=core)
    assert forward_only.passed
    assert forward_only.level is None
    whole = run_backend("toy_backends:Core", runs=all_runs(level="training"))
    assert whole.passed
    assert whole.level == "core"
    assert not whole.conformant("training")
    # One dtype and one layout are enough, as is said in `conformant`.
    assert run_backend("toy_backends:SinglePrecision", runs=core).level == "core"
    # What was not asked is not reached.
    assert run_backend("toy_backends:Core", runs=core[:8]).level is None
    spoilt = run_backend("toy_backends:NotANumber", runs=core)
    assert spoilt.level is None


def in_16_bits(status, *dtypes):
    """A report of a backend of these dtypes to which all came as its claims let it, but for one dtype."""

    def outcome(run):
        if run.dtype not in dtypes:
            return Outcome(run, "unclaimed")
        return Outcome(run, status.get(run.dtype, "pass"))

    return BackendReport("any", dtypes=dtypes, outcomes=tuple(map(outcome, all_runs())))


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_one_dtype_of_16_bits_is_enough_to_deploy(half):
    """Some cases are there in float16 alone, which a backend of bfloat16 cannot be asked."""
    assert {case.dtypes for case in CASES if case.family == "dtype"} >= {("float16",)}
    report = in_16_bits({}, "float32", "float64", half)
    assert report.level == "deploy"
    assert in_16_bits({}, "float32", half).level == "deploy"
    assert in_16_bits({half: "fail"}, "float32", "float64", half).level == "gan"
    both = in_16_bits({half: "error"}, "float32", "float64", "float16", "bfloat16")
    assert both.level == "gan"


def test_without_16_bits_nothing_is_deployed():
    report = in_16_bits({}, "float32", "float64")
    assert report.passed
    assert report.level == "gan"
    declined = in_16_bits({"bfloat16": "unclaimed"}, "float32", "float64", "bfloat16")
    assert declined.level == "gan"


def test_memory_that_cannot_be_measured_is_unclaimed_and_never_a_pass(on_path):
    runs = [run for run in all_runs() if run.case.family == "memory"]
    assert {o.status for o in run_backend("toy_backends:Frugal", runs=runs[:1]).outcomes} == {"pass"}
    report = run_backend("toy_backends:NeverForgets", runs=[*runs, FEW[0]])
    assert {(o.run.case.family, o.status) for o in report.outcomes} == {
        ("memory", "unclaimed"),
        (FEW[0].case.family, "pass"),
    }
    reasons = {outcome.message for outcome in report.outcomes if outcome.run.case.id == "SA-MEM-001"}
    assert len(reasons) == 1
    assert "memory cannot be measured here: the peak of the process cannot be reset" in reasons.pop()
    everything = (*in_16_bits({}, "float32", "float16").outcomes, *report.outcomes)
    lacking = [o for o in everything if o.run.case.family != "memory" or o.status != "pass"]
    assert BackendReport("any", dtypes=("float32", "float16"), outcomes=tuple(lacking)).level == "gan"


def test_nothing_is_called_where_memory_cannot_be_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "selfattn_core.conformance.questions.peak_memory._RESET", tmp_path / "absent" / "clear_refs"
    )
    called = []
    with pytest.raises(PeakUnknownError, match="as on Linux"):
        peak_growth(lambda: called.append(1))
    assert called == []


def test_an_expected_failure_is_told_apart(on_path):
    report = run_backend("toy_backends:KnownFailure", runs=FEW)
    known = [outcome for outcome in report.outcomes if outcome.run.case.id == "SA-FWD-001"]
    assert {outcome.status for outcome in known} == {"expected-failure"}
    assert {(outcome.reason, outcome.link) for outcome in known} == {
        ("it divides by zero", "https://example.org/1")
    }
    others = [o for o in report.outcomes if o.run.case.id == "SA-FWD-002"]
    assert {outcome.status for outcome in others} == {"fail"}
    only = run_backend("toy_backends:KnownFailure", runs=[run for run in FEW if run.case.id != "SA-FWD-002"])
    assert only.passed
    assert not only.conformant("core")


def test_a_crash_is_never_the_expected_failure(on_path):
    report = run_backend("toy_backends:KnownCrash", runs=[r for r in FEW if r.case.id == "SA-MAP-001"])
    assert {outcome.status for outcome in report.outcomes} == {"error"}
    assert not report.passed


def test_a_failure_that_is_no_more_is_a_failure(on_path):
    report = run_backend("toy_backends:StaleFailure", runs=FEW)
    bad = [outcome for outcome in report.outcomes if outcome.status != "pass"]
    assert [outcome.run.id for outcome in bad] == ["SA-FWD-001/float64/channels_last"]
    assert "take SA-FWD-001/float64 out of expected_failures" in bad[0].message


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


def test_a_name_that_is_no_backend():
    with pytest.raises(ValueError, match="expected one of torch, keras-tensorflow"):
        run_backend("tensorfow")
    with pytest.raises(ValueError, match="or module:object for your own"):
        run_backend("torch:")


def test_no_forward_case_can_see_the_key_bias():
    class WithoutKeyBias(Reference):
        def build(self, config, params, dtype, layout):
            return super().build(
                config, {n: 0 * a if n == "key.bias" else a for n, a in params.items()}, dtype, layout
            )

    outcomes = list(judge_in_process(WithoutKeyBias(), FEW))
    status = {
        family: {o.status for o in outcomes if o.run.case.family == family} for family in ("forward", "map")
    }
    assert status == {"forward": {"pass"}, "map": {"pass"}}
    assert "fail" in {o.status for o in outcomes if o.run.case.family == "params"}


def test_the_json_holds_every_verdict(on_path):
    report = run_backend("toy_backends:NotANumber", runs=FEW)
    content = json.loads(json.dumps(as_data([report]), allow_nan=False))
    (backend,) = content["backends"]
    assert backend["passed"] is False
    assert len(backend["outcomes"]) == len(FEW)
    forward = [outcome for outcome in backend["outcomes"] if outcome["family"] == "forward"]
    assert forward[0]["ratios"] == {"y": None}
    assert "NaN" in forward[0]["message"]


def selfattn(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from selfattn_core.cli import main; main(prog_name='selfattn')"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


def test_the_command_exits_by_what_it_found(on_path, tmp_path):
    good = selfattn("conform", "toy_backends:InferenceOnly", "--level", "core", "--json", "-")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["backends"][0]["name"] == "toy_backends:InferenceOnly"
    assert "noise floor" in good.stderr
    assert "conformant at  no level" in re.sub(r" {2,}", "  ", good.stderr)
    bad = selfattn("conform", "toy_backends:NotANumber", "toy_backends:InferenceOnly", "--level", "core")
    assert bad.returncode == 1
    assert "FAILED" in bad.stdout
    assert "toy_backends:InferenceOnly" in bad.stdout
    wrong = selfattn("conform", "tensorfow", "a:", ":b")
    assert wrong.returncode == 2
    assert "unknown backend tensorfow; known are torch" in wrong.stderr
    assert "unknown backend a:; known" in wrong.stderr
    assert "unknown backend :b; known" in wrong.stderr
    refused = selfattn("conform", "toy_backends:Absent", "toy_backends:NotANumber", "--level", "core")
    assert refused.returncode == 2
    assert "did not start: backend 'toy_backends:Absent': toy_backends has no 'Absent'." in refused.stdout
    nothing = selfattn("conform", "toy_backends:ClaimsNothing", "--level", "core")
    assert nothing.returncode == 1
    assert "toy_backends:ClaimsNothing: claims nothing that was asked at level core" in nothing.stdout
    one = tmp_path / "report"
    same = selfattn("conform", "torch", "--json", str(one), "--html", str(tmp_path / "." / "report"))
    assert same.returncode == 2
    assert f"--json and --html cannot all go to {one}" in " ".join(same.stderr.split())
    assert not one.exists()
    unwritable = selfattn(
        "conform", "toy_backends:InferenceOnly", "--json", str(tmp_path / "absent" / "r.json")
    )
    assert unwritable.returncode == 2
    assert "there is no folder" in unwritable.stderr
    assert "core" not in unwritable.stdout, "no backend is asked before that"
    assert "Traceback" not in unwritable.stderr


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "selfattn_core.cli", "conform", "tensorfow"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "Usage: selfattn conform" in result.stderr


def test_a_missing_backend_is_told_at_once(monkeypatch):
    missing = dataclasses.replace(REGISTRY["torch"], requires=("no_such_framework",))
    monkeypatch.setitem(REGISTRY, "torch", missing)
    began = time.monotonic()
    report = run_backend("torch")
    assert time.monotonic() - began < 1
    assert report.missing == ("no_such_framework",)
    assert not report.passed
    assert "no_such_framework not installed: pip install 'selfattn[torch]'" in as_table(as_data([report]))


def test_every_ability_is_needed_by_a_case():
    assert set().union(*(needs(case) for case in CASES)) == Reference().claims() | {"memory"}


def test_a_run_may_be_one_of_a_table_of_ones_own(on_path):
    run = Run(CASES[0], "float32", "channels_last")
    backend = resolve("toy_backends:Good")
    given = inputs(run.case, run.dtype)
    y = backend.forward(backend.build(run.case.config, given.params, run.dtype, run.layout), given.x)
    assert compare(run, {"y": y}).status == "pass"
    assert compare(run, {"y": y * np.float32(1.001)}).ratio > FACTOR
