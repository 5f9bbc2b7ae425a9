"""The bound on what rounded logits do to the output, against logits summed in every order, with and without FMA."""

import itertools

import numpy as np
import pytest

from tests.ops.rounded_logits import shift_of_output

EPS = float(np.finfo(np.float32).eps)


def attended(logits, value):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ value


def summed(query, key, order, fused):
    """Logits in float32, summed over the width in this order, with a rounding of each product or without."""
    total = np.zeros((query.shape[0], key.shape[0]), np.float32)
    for column in order:
        # Products of two float32 are exact in float64, in which the sum is rounded once more, by 2⁻²⁹ of the other.
        product = np.outer(query[:, column].astype(np.float64), key[:, column].astype(np.float64))
        total = np.float32(total + (product if fused else np.float32(product)))
    return total


def kernels(query, key, generator):
    """Logits as processors may compute them: each tile of keys by a kernel of its own, with its own order."""
    orders = list(itertools.islice(itertools.permutations(range(query.shape[1])), 24))
    ways = [summed(query, key, order, fused) for order in orders for fused in (False, True)]
    for _ in range(50):
        chosen = generator.integers(len(ways), size=key.shape[0])
        yield np.stack([ways[way][:, column] for column, way in enumerate(chosen)], axis=-1)


def shares(query, key, value, generator):
    """Shifts of the output as shares of the bound, and the largest in eps of the largest output."""
    wide = [array.astype(np.float64) for array in (query, key, value)]
    want = attended(wide[0] @ wide[1].T, wide[2])
    bound = shift_of_output(*wide, EPS)
    shifts = [
        np.abs(attended(np.float64(logits), wide[2]) - want) for logits in kernels(query, key, generator)
    ]
    # In float64 the same roundings take place, of the logits wanted and of what follows on either side.
    double = float(np.finfo(np.float64).eps)
    noise = shift_of_output(*wide, double) + 32 * double * np.abs(value).max()
    return np.max((np.array(shifts) - noise) / (bound + noise)), np.max(shifts) / (EPS * np.abs(want).max())


@pytest.mark.parametrize("width", [1, 3, 8])
def test_no_order_of_summation_exceeds_the_bound(width):
    generator = np.random.default_rng(width)
    largest = 0.0
    for scale in (1.0, 8.0, 1e4):
        for _ in range(8):
            query, key, value = (
                generator.normal(size=shape).astype(np.float32) for shape in ((11, width), (7, width), (7, 5))
            )
            key[3:6] = key[1]
            query *= np.float32(scale / width)
            share, _ = shares(query, key, value, generator)
            assert share <= 1
            largest = max(largest, share)
    # Not an empty bound: with a single product in a logit its only rounding nearly reaches it.
    assert largest > (0.7 if width == 1 else 0.1)


def test_tied_logits_of_ten_thousand_move_the_output_by_hundreds_of_eps():
    """What MKL does on a processor with AVX-512: without it a limit of 16 eps held by luck."""
    generator = np.random.default_rng(0)
    query, key = (
        np.float32(np.sqrt(1e4 / 3)) * generator.choice(np.float32([-1, 1]), size=(rows, 3))
        for rows in (11, 7)
    )
    value = generator.normal(size=(7, 5)).astype(np.float32)
    share, moved = shares(query, key, value, generator)
    assert share <= 1
    assert moved > 160


def test_whole_numbers_are_summed_exactly():
    generator = np.random.default_rng(0)
    query, key = (np.float32(64) * generator.choice(np.float32([-1, 1]), size=(rows, 3)) for rows in (11, 7))
    assert not shift_of_output(*map(np.float64, (query, key, np.ones((7, 5)))), EPS).any()
    for logits in kernels(query, key, generator):
        np.testing.assert_array_equal(logits, np.float64(query) @ np.float64(key).T)
    assert shift_of_output(*map(np.float64, (query + 0.5, key, np.eye(7))), EPS).any()
    assert shift_of_output(*map(np.float64, (query * 64, key * 64, np.eye(7))), EPS).any()
