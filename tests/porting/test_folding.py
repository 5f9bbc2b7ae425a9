"""Folding by itself: rules where they differ, vectors on either side, rounding once."""

import numpy as np
import pytest

from selfattn_core.porting.dialects.dialect import SpectralNorm
from selfattn_core.porting.dialects.kernel_axes import from_matrix, matrix_shape, to_matrix
from selfattn_core.porting.translation import folding
from selfattn_core.porting.translation.folding import cast, spectral_state

RNG = np.random.Generator(np.random.PCG64(3))
K = RNG.standard_normal((7, 5))


def rule(sigma="iterate", side="out", normalize="max", eps=1e-12, iterations=1):
    return SpectralNorm("u", "v", sigma, side, normalize, eps, iterations)


@pytest.mark.parametrize(
    ("normalize", "unit"),
    [
        ("max", lambda t, eps: t / max(np.sqrt((t**2).sum()), eps)),
        ("add", lambda t, eps: t / (np.sqrt((t**2).sum()) + eps)),
        ("root-max", lambda t, eps: t / np.sqrt(max((t**2).sum(), eps))),
        ("root-add", lambda t, eps: t / np.sqrt((t**2).sum() + eps)),
    ],
)
def test_each_rule_with_an_eps_that_matters(normalize, unit):
    eps, u = 50.0, RNG.standard_normal(5)
    v = unit(K @ u, eps)
    u_next = unit(K.T @ v, eps)
    got = spectral_state(rule(normalize=normalize, eps=eps), K, u[None], None)
    for found, wanted in zip(got, (u_next, v, v @ K @ u_next), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-13)
    others = [spectral_state(rule(normalize=n, eps=eps), K, u, None)[2] for n in folding._NORMALIZE]
    assert len({round(sigma, 9) for sigma in others}) == 4


def test_a_vector_on_the_other_side():
    u = RNG.standard_normal((7, 1))
    v = K.T @ u[:, 0]
    v /= np.linalg.norm(v)
    w = K @ v
    w /= np.linalg.norm(w)
    for side in ("in", "shape"):
        got_u, got_v, sigma = spectral_state(rule(side=side), K, u, None)
        np.testing.assert_allclose(got_u, v, rtol=1e-13)
        np.testing.assert_allclose(got_v, w, rtol=1e-13)
        assert sigma == pytest.approx(w @ K @ v, rel=1e-13)


def test_the_shape_tells_the_side_of_a_square_kernel():
    square, u = K[:5], RNG.standard_normal(5)
    out = spectral_state(rule(side="shape"), square, u[None], None)[2]
    across = spectral_state(rule(side="shape"), square, u[:, None], None)[2]
    assert out == pytest.approx(spectral_state(rule(side="out"), square, u, None)[2])
    assert abs(out - across) > 1e-3


def test_stored_vectors_are_taken_as_they_are():
    u, v = RNG.standard_normal(5), RNG.standard_normal(7)
    got = spectral_state(rule("stored"), K, u, v)
    np.testing.assert_array_equal(got[0], u)
    np.testing.assert_array_equal(got[1], v)
    assert got[2] == pytest.approx(v @ K @ u, rel=1e-13)


def test_more_iterations_come_nearer_to_the_largest_singular_value():
    exact = np.linalg.svd(K)[1][0]
    errors = [exact - spectral_state(rule(iterations=n), K, np.ones(5), None)[2] for n in (1, 3, 30)]
    assert errors[0] > errors[1] > errors[2] > -1e-12
    assert errors[2] < 1e-6


@pytest.mark.parametrize(
    ("given", "shape", "message"),
    [
        (rule(), (7,), "expected 5 elements"),
        (rule(), (5, 2), "expected 5 elements"),
        (rule(side="in"), (5,), "expected 7 elements"),
        (rule(side="shape"), (5,), r"expected \(1, 5\) or \(7, 1\)"),
        (rule("stored"), (5,), "has 5 elements, expected 7"),
    ],
)
def test_vectors_of_a_wrong_size(given, shape, message):
    with pytest.raises(ValueError, match=message):
        spectral_state(given, K, np.ones(shape), np.ones(5))


@pytest.mark.parametrize("axes", ["OIHW", "OIL", "OI", "HWIO", "IO", "I1O", "1IO", "O11I"])
def test_axes_there_and_back(axes):
    stored = from_matrix(K, axes)
    assert matrix_shape(stored.shape, axes) == K.shape
    np.testing.assert_array_equal(to_matrix(stored, axes), K)
    assert stored.flags.c_contiguous


def test_axes_of_the_paper_layouts():
    np.testing.assert_array_equal(from_matrix(K, "OIHW")[:, :, 0, 0], K.T)
    np.testing.assert_array_equal(from_matrix(K, "HWIO")[0, 0], K)
    assert matrix_shape((8, 64, 3, 3), "OIHW") is None
    assert matrix_shape((8, 64), "OIHW") is None


def test_a_result_is_rounded_once(monkeypatch):
    """In float64 and then to the dtype; in pieces, which must not be seen."""
    kernel = K.astype(np.float32)
    factor = RNG.standard_normal(5)
    wanted = (kernel.astype(np.float64) / 1.7 * factor).astype(np.float32)
    monkeypatch.setattr(folding, "_ROWS", 10)
    np.testing.assert_array_equal(cast(kernel, np.float32, divisor=1.7, factor=factor), wanted)
    wanted_bias = (kernel[0].astype(np.float64) * factor).astype(np.float32)
    np.testing.assert_array_equal(cast(kernel[0], np.float32, factor=factor), wanted_bias)
    got = spectral_state(rule("stored"), kernel, np.ones(5), np.ones(7))[2]
    assert got == pytest.approx(float(kernel.astype(np.float64).sum()), rel=1e-14)


def test_a_plain_copy_is_the_same_bits_and_a_copy():
    kernel = K.astype(np.float32)
    copy = cast(kernel.T, np.float32)
    assert copy.flags.c_contiguous
    np.testing.assert_array_equal(copy, kernel.T)
    copy[:] = 0
    assert kernel.any()
