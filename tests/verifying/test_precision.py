"""The formats that files are held to: inputs that they hold, and floors in the order of their precision."""

from itertools import pairwise

import numpy as np
import pytest

from selfattn_core import SelfAttentionConfig
from selfattn_core.conformance.cases import Case
from selfattn_core.conformance.inputs import inputs, rounded
from selfattn_core.conformance.tolerance import measure
from selfattn_core.verifying.precision import PRECISIONS, expected, held
from selfattn_core.verifying.questions import Question, questions

CONFIG = SelfAttentionConfig(16, qk_channels=3, kv_pool=2)


def params():
    return inputs(Case("", "forward", "", CONFIG), "float64").params


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_input_is_held_by_the_file_and_by_the_format(dtype, precision):
    x = np.random.default_rng(0).standard_normal((2, 3, 5))
    given = held(x, dtype, precision)
    assert given.dtype == np.float64
    for each in {dtype, precision} - {"int8", "float64"}:
        assert (rounded(given, each).astype(np.float64) == given).all()
    assert not (given == x).any()


def test_floors_are_in_the_order_of_the_formats():
    x = np.random.default_rng(1).standard_normal((2, 5, 7, 16))
    floors = [
        expected(CONFIG, params(), Question("", held(x, "float32", each)), each, ("y", "map"))
        for each in PRECISIONS
    ]
    for quantity in ("y", "map"):
        double, single, half, brain, eight = (floor[quantity].floor for floor in floors)
        assert all(2 * one < other for one, other in pairwise((double, single, half, brain)))
        # 256 levels of a range are about as coarse as the 8 bits of a bfloat16.
        assert half < eight < 8 * brain


def test_the_map_of_the_largest_question_has_several_blocks_and_odd_sides():
    for pool in (1, 2, 3):
        config = SelfAttentionConfig(16, kv_pool=pool)
        drawn = inputs(Case("", "forward", "", config), "float64").params
        shapes = {question.x.shape for question in questions(config, drawn, (None, None, None), "float32")}
        _, height, width, _ = max(shapes, key=lambda shape: shape[1] * shape[2])
        down, across = config.key_grid(height, width)
        assert height * width * down * across * 4 > 2 * 8 * 2**20
        assert height != width


def test_keys_may_be_added_up_one_after_the_other():
    """On a map of equal weights numpy's sums in pairs are nearly exact, and sums in turn are off by many ulp."""
    config = SelfAttentionConfig(16)
    drawn = {
        name: array.astype(np.float32)
        for name, array in inputs(Case("", "forward", "", config), "float64").params.items()
    }
    wide = {name: array.astype(np.float64) for name, array in drawn.items()}
    x = np.broadcast_to(np.random.default_rng(2).standard_normal(16).astype(np.float32), (1, 40, 41, 16))
    rows = x.reshape(-1, 16)
    query, key, value = (
        rows @ drawn[f"{role}.kernel"] + drawn[f"{role}.bias"] for role in ("query", "key", "value")
    )
    # Every row of the map is the same.
    weights = np.exp(query[:1] @ key.T - (query[:1] @ key.T).max())
    total = np.add.accumulate(weights, axis=-1)[:, -1:]
    attended = np.add.accumulate((weights / total).T * value, axis=0)[-1:]
    y = (x + drawn["gamma"] * attended).astype(np.float64)
    question = Question("", x.astype(np.float64))
    verdicts = [
        measure("y", y, expected(config, wide, question, "float32", ("y",), in_turn=in_turn)["y"], 8.0)
        for in_turn in (False, True)
    ]
    assert [verdict.passed for verdict in verdicts] == [False, True]
    # One key of 1640 left out is more than that.
    lost = y + drawn["gamma"] * value[:1] / 1640
    wider = expected(config, wide, question, "float32", ("y",), in_turn=True)["y"]
    assert not measure("y", lost.astype(np.float64), wider, 8.0).passed
