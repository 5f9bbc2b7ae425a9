"""What a framework does to float32 by default is measured, and a layer is held to as much."""

import numpy as np
import pytest

from selfattn_core import spec
from selfattn_core.conformance.cases import CASES
from selfattn_core.conformance.formats import FORMATS, coarsest, kept_bits, measured, spec_in
from selfattn_core.conformance.inputs import inputs
from selfattn_core.conformance.mutants.shipped import RoundsOperands
from selfattn_core.conformance.selftest import judge_in_process, small_runs
from selfattn_core.conformance.tolerance import expect, expect_shipped

LABELS = list(FORMATS)
RUNS = [run for run in small_runs(["shipped"]) if run.case.of in ("forward", "r1")]


@pytest.mark.parametrize("label", LABELS)
def test_a_product_shows_its_format(label):
    backend = RoundsOperands("float32", label)
    assert measured(backend.default_products) == {"matrix product": label}


def test_either_operand_shows_it():
    ways = {
        "left": lambda left, right: {"product": kept_bits(left, "bf16") @ right},
        "right": lambda left, right: {"product": left @ kept_bits(right, "bf16")},
    }
    assert {name: measured(way) for name, way in ways.items()} == {name: {"product": "bf16"} for name in ways}


def test_what_is_no_product():
    with pytest.raises(ValueError, match="coarser than any format"):
        measured(lambda left, right: {"matmul": np.float32(1.1) * left @ right})
    with pytest.raises(ValueError, match="coarser than any format"):
        measured(lambda left, right: {"matmul": np.nan * left @ right})
    with pytest.raises(ValueError, match="shape"):
        measured(lambda left, right: {"matmul": (left @ right)[:3]})


def test_the_coarsest_counts():
    assert coarsest({"a": "tf32", "b": "float32", "c": "bf16x3"}) == "tf32"
    assert coarsest({}) == "float32"


def test_float32_is_the_spec_itself_and_has_its_limits():
    case = RUNS[0].case
    given = inputs(case, "float32")
    answers = [module.forward(case.config, given.params, given.x) for module in (spec, spec_in("float32"))]
    assert answers[0].tobytes() == answers[1].tobytes()
    wanted, shipped = expect(case, "float32"), expect_shipped(case, "float32")
    assert [(each.floor, each.cap) for each in wanted.values()] == [
        (each.floor, each.cap) for each in shipped.values()
    ]


def test_nothing_else_has_other_limits():
    """A format is what the family shipped is held to; of the same case in another family it changes nothing."""
    case = next(case for case in CASES if case.family == "forward")
    right = expect(case, "float32")["y"]
    assert right.floor < expect_shipped(RUNS[0].case, "tf32")["y"].floor / 100


@pytest.mark.parametrize("default", LABELS)
def test_a_layer_that_keeps_as_much_as_the_default_passes(default):
    for computes in LABELS[: LABELS.index(default) + 1]:
        for seed in (1, 2):
            outcomes = list(judge_in_process(RoundsOperands(computes, default), RUNS, seed))
            assert [outcome.message for outcome in outcomes if outcome.status != "pass"] == []
            assert {outcome.label for outcome in outcomes} == {default}
            assert max(outcome.ratio for outcome in outcomes) <= 1


@pytest.mark.parametrize(
    ("computes", "default"),
    [("tf32", "float32"), ("bf16", "tf32"), ("bf16", "tf32 truncated"), ("tf32", "bf16x3")],
)
def test_a_layer_that_keeps_less_fails(computes, default):
    outcomes = list(judge_in_process(RoundsOperands(computes, default), small_runs(["shipped"])))
    assert "fail" in {outcome.status for outcome in outcomes}
