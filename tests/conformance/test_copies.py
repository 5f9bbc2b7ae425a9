"""The answers to maps whose positions are copies of few follow from those to the few."""

import dataclasses

import numpy as np
import pytest

from selfattn_core import SelfAttentionConfig
from selfattn_core.conformance.cases.case import Case
from selfattn_core.conformance.cases.copies import few, order, times
from selfattn_core.conformance.cases.inputs import inputs
from selfattn_core.conformance.cases.table import CASES
from selfattn_core.conformance.questions.ask import answers
from selfattn_core.conformance.reference import FusedLayer, LayerReference, Reference
from selfattn_core.conformance.verdicts.expected import expect
from selfattn_core.conformance.verdicts.tolerance import judge

FORMS = {
    "flat": SelfAttentionConfig(9, 2),
    "out projection": SelfAttentionConfig(9, 2, 5, out_projection=True),
    "no biases": SelfAttentionConfig(9, 2, 5, out_projection=True, use_bias=False),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("computation", ["forward", "vjp", "r1", "mixed"])
def test_the_identity_holds_for_the_definition(form, computation):
    """Over all N×N scores, in float64."""
    case = Case("copies", "forward", "", FORMS[form], (2, 4, 6), of=computation, copies=4)
    given, small = inputs(case, "float64"), inputs(few(case), "float64")
    whole = answers(Reference(), dataclasses.replace(case, copies=1), given, "float64", "channels_last")
    of_few = answers(Reference(), few(case), small, "float64", "channels_last")
    assert whole.keys() == of_few.keys()
    for name, value in whole.items():
        want = times(case, name, np.asarray(of_few[name]))
        assert np.shape(value) == want.shape
        np.testing.assert_allclose(value, want, rtol=0, atol=1e-12 * max(1, np.abs(want).max()), err_msg=name)


def test_each_position_occurs_equally_often_and_the_kinds_drift():
    case = next(case for case in CASES if case.copies > 1)
    kinds = order(case)
    assert (np.bincount(kinds) == case.copies).all()
    blocks = kinds.reshape(-1, 64)
    assert all(len(set(block)) > 4 for block in blocks)
    # No block of keys has all kinds, so that the running maximum of an online softmax moves.
    assert all(set(block) != set(kinds) for block in blocks)
    assert set(blocks[0]).isdisjoint(blocks[-1])
    given = inputs(case, "float32")
    positions = given.x.reshape(given.x.shape[0], -1, given.x.shape[-1])
    assert len(np.unique(positions[0], axis=0)) == len(set(kinds))


@pytest.mark.parametrize("layer", [Reference, lambda: LayerReference(FusedLayer)], ids=["spec", "fused"])
@pytest.mark.parametrize("computation", ["forward", "vjp", "r1", "mixed"])
def test_the_definition_is_far_inside_the_limits(layer, computation):
    """1,536 positions in float32, so that sums are as long as they are in the cases."""
    case = Case("copies", "forward", "", FORMS["flat"], (1, 32, 48), of=computation, copies=32)
    found = answers(layer(), case, inputs(case, "float32"), "float32", "channels_last")
    for name, wanted in expect(case, "float32").items():
        verdict = judge(name, np.asarray(found[name]), wanted, "float32")
        assert verdict.passed, verdict.message
        assert verdict.ratio < 4, name


def test_pooling_and_other_numbers_of_positions_are_refused():
    pooled = Case("copies", "forward", "", SelfAttentionConfig(9, 2, kv_pool=2), (1, 4, 6), copies=4)
    with pytest.raises(ValueError, match="with kv_pool 2; expected no pooling"):
        few(pooled)
    uneven = Case("copies", "forward", "", FORMS["flat"], (1, 4, 6), copies=5)
    with pytest.raises(ValueError, match=r"5 copies of each position of \(1, 4, 6\)"):
        few(uneven)
