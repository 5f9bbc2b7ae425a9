"""The kit measures the format of a framework's default products, and judges its layers in that format."""

import ast
import inspect
from types import ModuleType

import numpy as np
import pytest

from selfattn_core import spec
from selfattn_core.conformance.cases.inputs import inputs
from selfattn_core.conformance.cases.table import CASES
from selfattn_core.conformance.execution.in_process import judge_in_process
from selfattn_core.conformance.mutants.selftest import small_runs
from selfattn_core.conformance.mutants.shipped import RoundsOperands
from selfattn_core.conformance.reference import LayerReference, Reference
from selfattn_core.conformance.verdicts.expected import expect, expect_shipped, quantities
from selfattn_core.conformance.verdicts.product_formats import (
    FORMATS,
    coarsest,
    kept_bits,
    measured,
    rounding_layer,
)
from selfattn_core.conformance.verdicts.tolerance import FACTORS, SHIPPED_FACTORS

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
    references = (Reference(), LayerReference(rounding_layer("float32")))
    answers = [quantities(case, given, "float32", each)["y"] for each in references]
    assert answers[0].tobytes() == answers[1].tobytes()
    wanted, shipped = expect(case, "float32"), expect_shipped(case, "float32")
    assert [(each.floor, each.cap) for each in wanted.values()] == [
        (each.floor, each.cap) for each in shipped.values()
    ]


class EveryProduct(ast.NodeTransformer):
    """Replaces every `left @ right` by a call."""

    def visit_BinOp(self, node):
        self.generic_visit(node)
        if not isinstance(node.op, ast.MatMult):
            return node
        return ast.copy_location(
            ast.Call(ast.Name("rounded_product", ast.Load()), [node.left, node.right], []), node
        )


def spec_with_every_product_in(label):
    module = ModuleType(spec.__name__)
    module.rounded_product = lambda left, right: kept_bits(left, label) @ kept_bits(right, label)
    tree = ast.fix_missing_locations(EveryProduct().visit(ast.parse(inspect.getsource(spec))))
    exec(compile(tree, "<every product>", "exec"), module.__dict__)  # noqa: S102
    return module


@pytest.mark.parametrize("label", ["tf32", "bf16 truncated"])
def test_every_product_of_the_spec_rounds_its_operands(label):
    whole, layer = Reference(spec_with_every_product_in(label)), LayerReference(rounding_layer(label))
    chosen = ("forward", "map", "vjp", "r1", "mixed", "spectral_norm")
    for case in CASES:
        if case.family in chosen and case.of not in ("init", "params") and np.prod(case.shape[1:]) < 100:
            given = inputs(case, "float32")
            found, wanted = (quantities(case, given, "float32", each) for each in (layer, whole))
            for name, want in wanted.items():
                assert np.asarray(found[name]).tobytes() == np.asarray(want).tobytes(), (case.id, name)


@pytest.mark.parametrize(
    ("id_", "dtype", "quantity", "floor", "cap"),
    [
        ("SA-FWD-001", "float32", "y", 2.9342019612874834e-06, 2.0636495060287842e-05),
        ("SA-MAP-001", "float64", "map", 2.238808643132053e-15, 8.12007239120685e-15),
        ("SA-VJP-001", "float32", "query.kernel", 5.265984030433845e-05, 0.0012906500889750933),
        ("SA-DTY-001", "bfloat16", "y", 0.29602660528652536, 3.667432549821187),
    ],
)
def test_nothing_else_has_other_limits(id_, dtype, quantity, floor, cap):
    """Floor and cap before formats were introduced, at commit 549f443."""
    case = next(case for case in CASES if case.id == id_)
    found = expect(case, dtype)[quantity]
    assert found.cap == pytest.approx(cap, rel=1e-9)
    # The error of numpy in the floor depends on the order in which this processor sums.
    assert found.floor == pytest.approx(floor, rel=0.5)
    assert FACTORS == {"float32": 8, "float64": 8, "bfloat16": 4, "float16": 4}


def test_float32_may_be_as_wrong_as_elsewhere_and_other_formats_as_16_bits():
    assert {
        label: FACTORS["float32" if label == "float32" else "bfloat16"] for label in LABELS
    } == SHIPPED_FACTORS


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
