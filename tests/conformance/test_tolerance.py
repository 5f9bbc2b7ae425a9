"""The tolerances accept correct arithmetic and reject everything else."""

import dataclasses

import numpy as np
import pytest

from selfattn_core.conformance.cases.inputs import inputs
from selfattn_core.conformance.cases.table import CASES
from selfattn_core.conformance.execution.in_process import judge_in_process
from selfattn_core.conformance.mutants import edited
from selfattn_core.conformance.mutants.selftest import small_runs
from selfattn_core.conformance.mutants.sixteen_bits import InBfloat16
from selfattn_core.conformance.verdicts.expected import _terms, differentiated, expect
from selfattn_core.conformance.verdicts.tolerance import CAPS, EPS, FACTORS, judge


def test_a_right_backend_need_not_cancel_exactly():
    """Kernels in blocks compute D as rowsum(G∘o). With one key the gradient is zero, and they leave rounding errors."""
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
        # As fused kernels compute it: from the output, with factors that are rounded to 16 bits.
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


@pytest.mark.parametrize("family", ["vjp", "r1"])
def test_what_vanishes_is_still_looked_at(family):
    """An error of a thousandth of the cancelling terms is larger than rounding."""
    case = next(case for case in CASES if case.family == family and case.title == "one pooled key")
    given = inputs(case, "float64")
    terms = _terms(case, given, differentiated(case, given), 1)["query.kernel"]
    want = expect(case, "float32")["query.kernel"]
    assert not want.want.any()
    assert not judge(
        "query.kernel", np.full(want.want.shape, terms / 1000, np.float32), want, "float32"
    ).passed


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("family", ["forward", "vjp", "r1", "mixed"])
def test_the_cap_holds_whatever_the_floor(family, dtype):
    """However noisy the spec is, it cannot hide an error beyond the cap."""
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
    assert "bfloat16 cannot represent" in judge("y", want.want.astype(np.float32), want, "bfloat16").message


def test_nan_is_wanted_where_the_spec_has_it():
    case = next(case for case in CASES if case.family == "nonfinite")
    want = expect(case, "float32")["y"]
    assert np.isnan(want.want).any()
    assert np.isfinite(want.want).any()
    right = want.want.astype(np.float32)
    assert judge("y", right, want, "float32").passed
    assert "a number where NaN" in judge("y", np.nan_to_num(right), want, "float32").message
    assert "NaN or infinity where a number" in judge("y", right * np.nan, want, "float32").message
