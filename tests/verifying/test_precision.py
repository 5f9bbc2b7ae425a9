"""The formats that files are held to: inputs that they hold, and floors in the order of their precision."""

from itertools import pairwise

import numpy as np
import pytest

from selfattn_core import SelfAttentionConfig
from selfattn_core.conformance.cases.case import Case
from selfattn_core.conformance.cases.inputs import inputs, rounded
from selfattn_core.conformance.verdicts.tolerance import measure
from selfattn_core.verifying.precision import PRECISIONS, expected, held
from selfattn_core.verifying.questions import LARGEST_MAP, Question, questions

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


@pytest.mark.parametrize("sizes", [(None, None, None), (3, None, None), (None, 30, None), (2, None, 256)])
@pytest.mark.parametrize("pool", [1, 2, 3, 5])
def test_open_sizes_are_asked_in_several_blocks_and_beside_whole_windows(sizes, pool):
    config = SelfAttentionConfig(16, kv_pool=pool)
    drawn = inputs(Case("", "forward", "", config), "float64").params
    shapes = {question.x.shape for question in questions(config, drawn, sizes, "float32")}
    largest = max(shapes, key=lambda shape: shape[1] * shape[2])
    down, across = config.key_grid(*largest[1:3])
    assert 2 * 8 * 2**20 < 4 * largest[1] * largest[2] * down * across <= 4 * LARGEST_MAP
    for axis in (1, 2):
        assert all(sizes[axis] in (None, shape[axis]) for shape in shapes)
        if sizes[axis] is None:
            assert pool == 1 or any(shape[axis] % pool for shape in shapes)
    assert any(shape[1] != shape[2] for shape in shapes)


def test_a_map_that_is_too_large_is_no_reason_not_to_ask_the_others():
    config = SelfAttentionConfig(16)
    drawn = inputs(Case("", "forward", "", config), "float64").params
    shapes = {question.x.shape for question in questions(config, drawn, (1, 1200, None), "float32")}
    assert shapes
    assert all(shape[1] == 1200 and (1200 * shape[2]) ** 2 <= LARGEST_MAP for shape in shapes)


def test_a_batch_is_held_to_what_each_sample_is():
    x = np.random.default_rng(1).standard_normal((3, 5, 7, 16))
    whole = expected(CONFIG, params(), Question("", x), "float32", ("y", "map"))
    single = [
        expected(CONFIG, params(), Question("", x[b : b + 1]), "float32", ("y", "map")) for b in range(3)
    ]
    for name in ("y", "map"):
        assert (whole[name].want == np.concatenate([each[name].want for each in single])).all()
        assert whole[name].floor == max(each[name].floor for each in single)


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
