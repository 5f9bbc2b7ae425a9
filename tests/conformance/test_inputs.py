"""The inputs of the cases reveal bugs, and rounding decides nothing in them."""

import dataclasses

import numpy as np
import pytest

from selfattn_core import spec
from selfattn_core.conformance.cases.inputs import Inputs, _decided, inputs, rounded
from selfattn_core.conformance.cases.table import CASES
from selfattn_core.conformance.questions.ask import answers
from selfattn_core.conformance.reference import Reference


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
    """Otherwise two correct backends could send a gradient to different positions."""
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
