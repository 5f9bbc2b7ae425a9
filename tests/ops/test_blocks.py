"""How many rows a block has, for each kind of device: what is chosen for a card is computed here without one."""

import types

import pytest

from selfattn_ops import blocks
from selfattn_ops.blocks import ACCELERATOR_BUDGET, ACCELERATORS, SCORE_BUDGET, block_rows, score_budget

KINDS = ["cpu", "cuda", "gpu", "mps", "rocm", "tpu", "xpu", "meta", "hpu"]
SHAPES = ((1, 1500, 3), (1, 1501, 3), (1, 1501, 5))
"""Of queries, keys and values, whose scores are no single block of a CPU."""
SIZES = [
    (1, 64 * 64, 64 * 64),
    (1, 128 * 128, 128 * 128),
    (1, 256 * 256, 128 * 128),
    (16, 1024, 1024),
    (1, 7, 5),
]


@pytest.mark.parametrize(
    ("kind", "rows"),
    # Of maps of 64×64, 128×128 and 256×256 positions, in one sample.
    [
        ("cpu", (512, 128, 128)),
        *((kind, (512, 1024, 256)) for kind in sorted(ACCELERATORS)),
        ("meta", (512, 128, 128)),
    ],
)
def test_rows_of_a_block(kind, rows):
    found = []
    for side in (64, 128, 256):
        positions = side**2
        budget = score_budget(kind, 1, positions, positions)
        found.append(block_rows(None, 1, positions, positions, budget))
    assert tuple(found) == rows


def test_a_cpu_has_what_it_had():
    for sizes in SIZES:
        for dtype in ("float32", "float64", "bfloat16"):
            assert score_budget("cpu", *sizes, dtype) == SCORE_BUDGET == 8 * 2**20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_all_buffers_of_a_step_are_less_than_a_map(kind, sizes):
    whole = 4 * sizes[0] * sizes[1] * sizes[2]
    budget = score_budget(kind, *sizes)
    assert SCORE_BUDGET <= budget <= ACCELERATOR_BUDGET
    # Second derivatives have 13; a map that is a few budgets of a CPU is no more to a card.
    assert budget == SCORE_BUDGET or 13 * budget < whole
    assert score_budget(kind, *sizes, "float64") in (SCORE_BUDGET, budget // 2)


@pytest.fixture
def kinds(monkeypatch):
    """The kinds of device whose budget the operations of a framework have asked for."""

    def of(ops):
        asked = []

        def spied(kind, *given):
            asked.append(kind)
            return score_budget(kind, *given)

        monkeypatch.setattr(ops, "score_budget", spied)
        return asked

    return of


def test_attend_in_torch_asks_for_the_budget_of_the_device_of_its_tensors(kinds):
    torch = pytest.importorskip("torch")
    from selfattn_ops import torch as ops
    from selfattn_ops.torch import blocks

    asked = kinds(blocks)
    for device in ("cpu", "meta"):
        query, key, value = (torch.zeros(shape, device=device, requires_grad=True) for shape in SHAPES)
        ops.attend(query, key, value).sum().backward()
        assert set(asked) == {device}
        asked.clear()


def test_attend_in_jax_asks_for_the_budget_of_the_device_of_its_arrays(kinds, monkeypatch):
    jax = pytest.importorskip("jax")
    from selfattn_ops import jax as ops
    from selfattn_ops.jax import blocks

    asked = kinds(blocks)
    monkeypatch.setattr(ops, "device_kind", lambda _: "gpu")
    operands = [jax.numpy.zeros(shape) for shape in SHAPES]
    jax.grad(lambda *given: ops.attend(*given).sum())(*operands)
    assert set(asked) == {"gpu"}


def test_attend_in_tensorflow_asks_for_the_budget_of_the_device_of_its_tensors(kinds, monkeypatch):
    tf = pytest.importorskip("tensorflow")
    from selfattn_ops import tensorflow as ops
    from selfattn_ops.tensorflow import blocks

    asked = kinds(blocks)
    monkeypatch.setattr(blocks, "device_kind", lambda _: "gpu")
    query, key, value = (tf.zeros(shape) for shape in SHAPES)
    with tf.GradientTape() as tape:
        tape.watch(query)
        y = ops.attend(query, key, value)
    tape.gradient(y, query)
    # Whether one block is everything is asked with the budget of a CPU, which is the smallest.
    assert "gpu" in asked


def test_torch_takes_the_budget_of_its_device(monkeypatch):
    """The walk over the blocks, of tensors that say they are on a card."""
    torch = pytest.importorskip("torch")
    from selfattn_ops.torch import blocks as torch_blocks

    asked = []
    monkeypatch.setattr(torch_blocks, "score_budget", lambda *given: asked.append(given) or 4 * 3 * 11)
    monkeypatch.setattr(blocks, "MINIMUM_ROWS", 1)
    query = torch.zeros(2, 7, 3, dtype=torch.float64)
    key = torch.zeros(2, 11, 3, dtype=torch.float64)
    assert len(list(torch_blocks.blocks(query, key, None, torch.float64))) == 2 * 3
    assert asked == [("cpu", 2, 7, 11, "float64")]


def test_jax_takes_the_budget_of_its_device():
    jax = pytest.importorskip("jax")
    from selfattn_ops.jax.blocks import device_kind, plan

    side = 128 * 128
    assert plan((1, side, 8), side, None) == (1, 128)
    assert plan((1, side, 8), side, None, "gpu") == (1, 16)
    assert plan((1, side, 8), side, None, "tpu", "float64") == (1, 32)
    assert plan((1, side, 8), side, 256, "gpu") == (1, 64)
    assert device_kind(jax.numpy.zeros(3)) == "cpu"
    traced = []
    jax.jit(lambda x: traced.append(device_kind(x)) or x)(jax.numpy.zeros(3))
    with jax.default_device("gpu"):
        jax.make_jaxpr(lambda x: traced.append(device_kind(x)) or x)(1.0)
    assert traced == ["cpu", "gpu"]


def test_tensorflow_takes_the_budget_of_its_device(monkeypatch):
    tf = pytest.importorskip("tensorflow")
    from selfattn_ops.tensorflow.blocks import device_kind, plan

    side = 128 * 128
    assert plan(None, 1, side, side) == (1, 128)
    assert plan(None, 1, side, side, "gpu") == (1, 1024)
    assert plan(None, 1, side, side, "gpu", "float64") == (1, 512)
    assert [int(x) for x in plan(None, tf.constant(1), side, side, "gpu")] == [1, 128]
    assert device_kind(tf.zeros(3)) == "cpu"
    on_card = types.SimpleNamespace(device="/job:localhost/replica:0/task:0/device:GPU:1")
    assert device_kind(on_card) == "gpu"
    in_graph = types.SimpleNamespace(device="")
    assert device_kind(in_graph) == "cpu"
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda _: ["a card"])
    assert device_kind(in_graph) == "gpu"
