"""Maps whose weights run down into subnormal numbers, in torch's core: no product reads such a weight, and no result shows it."""

import pytest
import torch

from selfattn_ops.torch import attend, attend_transposed, derivatives
from selfattn_ops.torch import peaked as peaks
from selfattn_ops.torch.autograd import attend_in_blocks
from selfattn_ops.torch.peaked import raise_scores, raised, reach, unit

SMALLEST = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float64: 2.0**-1022}
Operands = list[torch.Tensor]


def peaked(deviation: float, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Operands:
    """Query, key, value and G of N = 37, M = 41, Dk = 5, Dv = 7, with scores of this standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((37, 5), (41, 5), (41, 7), (37, 7))
    query, *others = (torch.randn(3, *size, generator=generator, dtype=torch.float64) for size in sizes)
    return [operand.to(dtype) for operand in (query * deviation / 5**0.5, *others)]


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.softmax(query @ key.mT, dim=-1) @ value


def transposed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return attend_transposed(query.mT, key.mT, value.mT).mT


def answers(function: object, operands: Operands) -> Operands:
    """The output, its gradients, and the gradients of a squared gradient norm."""
    *leaves, grad = (operand.clone().requires_grad_(at < 3) for at, operand in enumerate(operands))
    out = function(*leaves)
    first = torch.autograd.grad(out, leaves, grad, create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in first)
    return [out, *first, *torch.autograd.grad(penalty, leaves)]


@pytest.mark.parametrize("deviation", [12.0, 25.0, 50.0])
@pytest.mark.parametrize("block_size", [None, 8])
def test_a_peaked_map_gives_the_answers_of_float64(deviation, block_size):
    agrees_with_float64(lambda *qkv: attend_in_blocks(*qkv, block_size), peaked(deviation))


@pytest.mark.parametrize("deviation", [12.0, 25.0, 50.0])
@pytest.mark.parametrize("function", [attend, transposed])
def test_a_small_peaked_map_gives_the_answers_of_float64(monkeypatch, deviation, function):
    monkeypatch.setattr(peaks, "_FEW", 0)
    agrees_with_float64(function, peaked(deviation))


def agrees_with_float64(function, operands):
    found = answers(function, operands)
    right = answers(plain, [operand.double() for operand in operands])
    # What rounding to float32 does to torch's own operators, several times over.
    rounded = answers(plain, operands)
    for answer, want, own in zip(found, right, rounded, strict=True):
        noise = (own.double() - want).abs().max()
        scale = want.abs().max()
        assert (answer.double() - want).abs().max() <= 8 * noise + 4 * 2.0**-23 * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-25])
def test_no_product_reads_a_subnormal_number(monkeypatch, dtype, size):
    *operands, grad = peaked(30.0, dtype)
    seen: list[float] = []

    def record(scores):
        numbers = scores.abs()
        seen.append(float(torch.where(numbers == 0, 1.0, numbers.float()).min()))

    factor, backward = derivatives.as_factor, derivatives.softmax_backward
    softmax = derivatives.softmax_scores
    monkeypatch.setattr(
        derivatives, "softmax_scores", lambda *a, out, **k: (softmax(*a, out=out, **k), record(out))[0]
    )
    monkeypatch.setattr(derivatives, "softmax_backward", lambda g, a: (backward(g, a), record(g))[0])
    monkeypatch.setattr(derivatives, "as_factor", lambda *a: (given := factor(*a), record(given))[0])
    answers(lambda *qkv: attend_in_blocks(*qkv, 16), [*operands, grad * size])
    assert len(seen) > 20
    assert min(seen) >= SMALLEST[dtype]


def test_raising_changes_a_row_by_less_than_its_rounding():
    query, key, *_ = peaked(40.0, torch.float64)
    scores = (query @ key.mT).float()
    raised = scores.clone()
    raise_scores(raised, reach(query.float(), key.float()))
    before, after = torch.softmax(scores.double(), -1), torch.softmax(raised.double(), -1)
    assert (raised > scores).any()
    assert (before - after).abs().sum(-1).max() < 2.0**-47


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("function", [attend, transposed])
@pytest.mark.parametrize("derivatives", [False, True])
def test_no_weight_of_a_small_map_is_subnormal(monkeypatch, dtype, function, derivatives):
    monkeypatch.setattr(peaks, "_FEW", 0)
    softmax, seen = torch.softmax, []
    monkeypatch.setattr(torch, "softmax", lambda *a, **k: (seen.append(softmax(*a, **k)), seen[-1])[1])
    query, key, value, _ = peaked(300.0 if dtype == torch.float64 else 40.0, dtype)
    function(query.requires_grad_(derivatives), key, value)
    assert len(seen) == 1
    smallest = 2.0**-1022 if dtype == torch.float64 else 2.0**-126
    assert (seen[0] >= smallest).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_that_cannot_be_subnormal_are_not_copied(monkeypatch, dtype):
    query, key, *_ = peaked(8.0, dtype)
    scores = query @ key.mT
    assert raised(scores) is scores
    monkeypatch.setattr(peaks, "_FEW", 0)
    assert raised(scores) is scores
    assert raised(scores * 100) is not scores


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_row_without_numbers_leaves_the_others_alone(monkeypatch, wrong):
    monkeypatch.setattr(peaks, "_FEW", 0)
    operands = peaked(40.0)
    clean = attend(*operands[:3])
    operands[0][1, 5, 2] = wrong
    out = attend(*operands[:3])
    touched = torch.isnan(out).any(-1)
    assert touched.nonzero().tolist() == [[1, 5]]
    torch.testing.assert_close(out[~touched], clean[~touched], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_diffuse_map_is_not_touched(dtype):
    query, key, *_ = peaked(1.0, dtype)
    assert reach(query, key) is None


def test_a_bound_that_no_row_comes_near_raises_nothing():
    """Two long vectors that never meet in one score, as their directions are at right angles."""
    query, key, *_ = peaked(1.0)
    query[1, 3], key[1, 7] = 0.0, 0.0
    query[1, 3, 0], key[1, 7, 1] = 40.0, 40.0
    assert peaks._spreads(query, key)
    assert reach(query, key) is None


@pytest.mark.parametrize("batch", [1, 3, 8, 20])
@pytest.mark.parametrize("rows", [1, 5, 37])
def test_few_rows_stand_for_all(batch, rows):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(batch, size, 5, generator=generator) for size in (rows, 41))
    assert reach(4 * query, 4 * key) is not None
    sampled = query.clone()
    sampled[0, 0] = 200.0
    assert reach(sampled, key) is not None
    assert reach(query * float("nan"), key) is not None


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_in_its_row(wrong):
    operands = peaked(25.0)
    clean = attend_in_blocks(*operands[:3], 8)
    operands[0][1, 5, 2] = wrong
    out = attend_in_blocks(*operands[:3], 8)
    touched = torch.isnan(out).any(-1)
    assert touched.nonzero().tolist() == [[1, 5]]
    assert torch.equal(out[~touched], clean[~touched])


@pytest.mark.parametrize(
    ("numbers", "wanted"),
    [([3.0, -5.0], 2.0**-3), ([0.0], 1.0), ([1e-20], 2.0**66), ([float("inf")], 1.0), ([1e38], 2.0**-100)],
)
def test_unit(numbers, wanted):
    assert unit(torch.tensor(numbers), None) == wanted
