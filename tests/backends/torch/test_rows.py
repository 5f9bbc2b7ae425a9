"""One map whose rows are in several processes, compared with one process. `programs/rows.py` is what each process runs."""

import pytest

from selfattn_torch.parallel.layout import Rows, chunked
from tests.backends.torch.ranks import answers, started

# In float64 the order of sums is the only difference.
ROUNDING = 1e-13


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """What three processes answer: an odd number, with one between the others."""
    store = tmp_path_factory.mktemp("rows") / "store"
    names = ("splits", "maps", "collectives", "refused", "styled")
    return answers("rows.py", 3, store, *names)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    store = tmp_path_factory.mktemp("rows") / "store"
    return answers("rows.py", 2, store, "distributed_tensors", "spectral_state", "meta")


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return answers("rows.py", 4, tmp_path_factory.mktemp("rows") / "store", "two_dimensions")


def test_every_division_of_the_rows_gives_the_layer_and_its_second_derivatives(three):
    for rank in three:
        assert len(rank["splits"]) == 30
        assert {name: error for name, error in rank["splits"].items() if not error < ROUNDING} == {}


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4, 8])
def test_the_same_on_more_processes(world, tmp_path):
    for rank in answers("rows.py", world, tmp_path / "store", "splits"):
        assert {name: error for name, error in rank["splits"].items() if not error < ROUNDING} == {}


def test_a_map_has_the_rows_of_its_process(three):
    for index, rank in enumerate(three):
        height = 3 if index == 2 else 2
        assert rank["maps"]["gather"] < ROUNDING
        assert rank["maps"]["stream"] < ROUNDING
        assert rank["maps"]["gather, no batch"] == [[6, height, 5], [5 * height, 6]]


# B = 2, W = 5, Dk = 2, Dv = 4, float64.
KEY, BOTH = 2 * 2 * 8, 2 * (2 + 4) * 8
GATHER, SCATTER, NUMBERS = "all_gather_into_tensor", "reduce_scatter_tensor", "_allgather_base_"


def test_collectives_and_bytes_are_those_of_the_formula(three):
    """One all-gather forward, one reduce-scatter backward, and nothing larger than keys and values of the whole map."""
    for rank in three:
        for name, keys in (("even", 3 * 2 * 5), ("pooled", 3 * 1 * 2), ("cut", 3 * 2 * 2)):
            forward, first, second, undeclared = rank["collectives"][name]
            assert forward == {GATHER: [1, keys * BOTH]}
            assert first == {SCATTER: [1, keys * BOTH]}
            assert second == {GATHER: [1, keys * BOTH], SCATTER: [1, keys * BOTH]}
            # Seven numbers of each process.
            assert undeclared == {**forward, NUMBERS: [1, 3 * 7 * 8]}


def test_values_stream_shard_by_shard(three):
    whole, shard = 3 * 2 * 5 * KEY, 3 * 2 * (2 * 5) * 4 * 8
    for rank in three:
        forward, first, second, _ = rank["collectives"]["stream"]
        assert forward == {GATHER: [1, whole], "broadcast_": [3, shard]}
        assert first == {SCATTER: [1, whole], "broadcast_": [3, shard], "reduce_": [3, shard]}
        # v again for the first derivative that has to be repeated, and twice v and its cotangent side by side.
        assert second == {
            GATHER: [1, whole],
            SCATTER: [1, whole],
            "broadcast_": [9, 5 * shard],
            "reduce_": [6, 2 * shard],
        }


def test_dtensors_are_computed_from_their_shards(two):
    """Sharded along B too, where torch's own convolution of a DTensor gives other second derivatives."""
    for rank in two:
        found = dict(rank["distributed_tensors"])
        assert found.pop("map") == [[2, 6, 3, 5], [2, 15, 2]]
        assert len(found) == 12
        assert {name: error for name, error in found.items() if not error < ROUNDING} == {}


def test_rows_times_data_under_ddp_and_fsdp2(four):
    """The loss is the sum over the row shards, so it is multiplied by their number where gradients are means over all."""
    for rank in four:
        assert len(rank["two_dimensions"]) == 4
        assert {name: error for name, error in rank["two_dimensions"].items() if not error < ROUNDING} == {}


@pytest.mark.parametrize("way", ["DDP", "DDP without buffers", "FSDP2"])
def test_spectral_norm_moves_alike_in_all_processes(two, way):
    """With two forward passes a step, on other images in each process."""
    assert [rank["spectral_state"][way] for rank in two] == ["", ""]


@pytest.mark.parametrize("way", ["DDP", "DDP without buffers"])
def test_one_more_call_in_one_process_is_seen_by_check_replicas(two, way):
    for rank in two:
        message = rank["spectral_state"][f"{way}, one call more"]
        assert "query.u in ranks [1], query.v in ranks [1]" in message
        assert "Broadcast the parameters and buffers of one rank" in message
        assert rank["spectral_state"][f"{way}, broadcast"] == ""


def test_spectral_norm_from_the_meta_device_under_fsdp2(two):
    for rank in two:
        assert rank["meta"]["differs"] == ""
        # 15 power iterations, and their limit.
        assert 0.7 < rank["meta"]["ratio"] < 1.0000001
        assert abs(rank["meta"]["exact"] - 1) < 1e-3
        assert rank["meta"]["y"] == [1, 16, 3, 4]


REFUSED = {
    "along W": "dimension 0 of its mesh has S(3)",
    "along C": "dimension 0 of its mesh has S(1)",
    "twice": "H is sharded over two dimensions of its mesh",
    "backwards": "the ranks of its mesh are not in ascending order",
    "style backwards": "got a mesh whose ranks are not in ascending order",
    "sharded parameters": "expected tensors, or DTensors replicated on the same mesh",
    "width": "width [5, 4, 3]",
    "dtype": "dtype [",
    "config": "config [",
    "kv differs": "kv [0, 1, 1]",
    "weights": "value.weight in ranks [1, 2], value.bias in ranks [1]",
    "heights": "expected 3 heights, of which number",
    "too few heights": "got heights (2,)",
    "kv": "kv='ring' must be",
    "numpy": "got input of type ndarray; expected a tensor",
    "small": "its map of 1×5 positions is smaller than one 2×2 pooling window",
    "style of a convolution": "got a module of type Conv2d; expected a SelfAttention2d",
    "style on two dimensions": "got a mesh of 2 dimensions; expected one",
    "other modules": "other parameters in ranks [1, 2] than in rank 0",
}


@pytest.mark.parametrize("attempt", REFUSED)
def test_what_cannot_be_computed_is_refused_in_every_process(three, attempt):
    for rank in three:
        assert REFUSED[attempt] in rank["refused"][attempt]


def test_the_style_of_parallelize_module(three):
    for rank in three:
        found = dict(rank["styled"])
        assert found.pop("repr").startswith("RowParallelSelfAttention2d(")
        assert found.pop("keys")
        assert set(found) == {
            f"{kv} {kind}" for kv in ("gather", "stream") for kind in ("tensor", "copy", "DTensor")
        }
        assert {name: error for name, error in found.items() if not error < ROUNDING} == {}


@pytest.mark.slow
def test_what_compiles_and_what_does_not(tmp_path):
    for rank in answers("rows.py", 2, tmp_path / "store", "compiled"):
        found = rank["compiled"]
        assert "pass heights to compile this" in found.pop("gather False True")
        assert "moves values between processes" in found.pop("stream True True")
        assert len(found) == 6
        assert {name: error for name, error in found.items() if not error < ROUNDING} == {}


@pytest.mark.slow
def test_the_others_end_with_an_error_when_a_process_dies(tmp_path):
    processes = started("dying.py", 3, tmp_path / "store")
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 9, 1]
    assert all("RuntimeError" in errors[rank] for rank in (0, 2))


def test_heights_of_a_dtensor_are_those_of_chunk():
    torch = pytest.importorskip("torch")
    for total in range(1, 12):
        for count in range(1, 6):
            chunks = [len(chunk) for chunk in torch.arange(total).chunk(count)]
            assert chunked(total, count) == (*chunks, *(0,) * (count - len(chunks)))


def test_pieces_cover_each_window_once():
    rows = Rows((1, 1, 0, 3, 2), 3)
    assert rows.windows(3) == [range(1), range(1), range(0), range(2), range(1, 2)]
    assert rows.pieces(3) == [(0, 3), (3, 2)]
    assert rows.begun_earlier(3) == [False, True, False, True, True]
    assert rows.parts(3) == [(0, 1), (1, 2)]
