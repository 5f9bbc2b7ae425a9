"""What a PyTorch user takes for granted; that the numbers are right is `selfattn conform`'s business."""

import copy
import io
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

import selfattn_core
from selfattn_core import SelfAttentionConfig, parameter_table, spec
from selfattn_core.conformance.cases.inputs import inputs
from selfattn_core.conformance.cases.table import CASES
from selfattn_core.params import glorot_limit
from selfattn_torch import SelfAttention2d, from_canonical, load, save, to_canonical
from tests.backends.torch.layers import layer_of_case

POOLED = SelfAttentionConfig.pooled(16)
LAYERS = [case for case in CASES if case.family == "params"]
POOLED_CASE = next(case for case in LAYERS if case.config == POOLED)


def test_a_fresh_layer_is_the_identity():
    x = torch.randn(2, 16, 5, 7)
    assert torch.equal(SelfAttention2d(16)(x), x)


def test_initialisation_follows_the_table():
    torch.manual_seed(0)
    layer = SelfAttention2d(256, value_channels=128, out_projection=True)
    for row in parameter_table(layer.config).values():
        values = to_canonical(layer)[row.name]
        if row.initial == "zeros":
            assert not values.any()
        else:
            limit = glorot_limit(*row.shape)
            assert np.abs(values).max() <= limit
            np.testing.assert_allclose(values.std(), limit / 3**0.5, rtol=0.03)
            assert abs(values.mean()) < 0.03 * limit
    assert not torch.equal(layer.query.weight, layer.key.weight)
    before = to_canonical(layer)
    torch.manual_seed(1)
    layer.reset_parameters()
    first = to_canonical(layer)
    torch.manual_seed(1)
    layer.reset_parameters()
    assert all(np.array_equal(first[name], value) for name, value in to_canonical(layer).items())
    assert not np.array_equal(first["query.kernel"], before["query.kernel"])


def test_the_state_dict_is_frozen():
    layer = SelfAttention2d(16, 3, 5, out_projection=True)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "gamma": (1,),
        "query.weight": (3, 16, 1, 1),
        "query.bias": (3,),
        "key.weight": (3, 16, 1, 1),
        "key.bias": (3,),
        "value.weight": (5, 16, 1, 1),
        "value.bias": (5,),
        "out.weight": (16, 5, 1, 1),
        "out.bias": (16,),
    }
    assert all(isinstance(child, nn.Conv2d) for child in layer.children())


def test_the_weights_choice_is_the_map_and_does_not_change_the_output():
    layer, x, _ = layer_of_case(POOLED_CASE, "float64")
    given = inputs(POOLED_CASE, "float64")
    y, attention = layer(x, need_weights=True)
    assert attention.shape == (2, 35, 6)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 35, dtype=torch.float64))
    torch.testing.assert_close(y, layer(x))
    want = spec.attention_map(POOLED, given.params, given.x)
    # In float64, where the limit is far from any processor's rounding; `conform` has the noise of float32.
    np.testing.assert_allclose(attention.detach(), want, rtol=0, atol=1e-12)


def test_unbatched_input():
    layer, x, _ = layer_of_case(LAYERS[0])
    y, attention = layer(x[0], need_weights=True)
    batched, maps = layer(x[:1], need_weights=True)
    assert torch.equal(y, batched[0])
    assert torch.equal(attention, maps[0])


def test_channels_last_memory_is_kept():
    layer, x, _ = layer_of_case(LAYERS[0])
    y = layer(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, 5, 7), "its 2 channels should be 24"),
        ((2, 3, 24, 5, 7), r"expected \(B, 24, H, W\) or \(24, H, W\): its rank is 5"),
        ((2, 23, 5, 7), "its 23 channels should be 24"),
        ((2, 24, 0, 7), "0×7 positions is smaller than one position"),
    ],
)
def test_an_input_that_does_not_fit(shape, words):
    with pytest.raises(ValueError, match=f"SelfAttention2d: got input of shape .*{words}"):
        SelfAttention2d(24)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.zeros((2, 16, 3, 5), np.float32), r"type numpy\.ndarray; .* torch\.from_numpy\(x\)"),
        ([[1.0]], r"type list; .* torch\.as_tensor\(x\)"),
        (None, r"type NoneType; .* torch\.as_tensor\(x\)"),
    ],
)
def test_an_input_that_is_no_tensor(x, words):
    with pytest.raises(TypeError, match=words):
        SelfAttention2d(16)(x)


class Standing:
    """Stands for a tensor, as torch lets classes do that are none."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __getattr__(self, name):
        return getattr(self.tensor, name)

    @classmethod
    def __torch_function__(cls, function, types, given=(), options=None):
        bare = [x.tensor if isinstance(x, cls) else x for x in given]
        return function(*bare, **(options or {}))


def test_an_input_that_stands_for_a_tensor():
    layer, x = SelfAttention2d(16), torch.randn(2, 16, 3, 5)
    assert torch.equal(layer(Standing(x)), layer(x))


def test_other_bad_input():
    with pytest.raises(TypeError, match=r"dtype torch\.int64; expected floating point"):
        SelfAttention2d(24)(torch.zeros(2, 24, 5, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match="1×7 positions is smaller than one 2×2 pooling window"):
        SelfAttention2d(24, kv_pool=2)(torch.zeros(2, 24, 1, 7))
    with pytest.raises(ValueError, match="pass qk_channels, for example qk_channels=1"):
        SelfAttention2d(4)
    with pytest.raises(ValueError, match=r"qk_channels=0 .*; kv_pool=0"):
        SelfAttention2d(16, 0, kv_pool=0)
    with pytest.raises(ValueError, match="pass out_projection=True"):
        SelfAttention2d(16, value_channels=8)
    with pytest.raises(ValueError, match="block_size=0 must be a positive integer"):
        SelfAttention2d(16, block_size=0)


def test_block_size_changes_nothing_but_memory():
    layer, x, _ = layer_of_case(LAYERS[0])
    given = inputs(LAYERS[0], "float32")
    small = from_canonical(layer.config, given.params, block_size=3)
    torch.testing.assert_close(small(x), layer(x))
    assert "block_size=3" in repr(small)


def test_repr_says_what_it_is():
    assert repr(SelfAttention2d(16, kv_pool=2)).splitlines()[1].strip() == (
        "16, qk_channels=2, value_channels=16, out_projection=False, kv_pool=2, spectral_norm=False, bias=True"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtype_is_that_of_the_module(dtype):
    layer = SelfAttention2d(16, dtype=dtype)
    layer.gamma.data.fill_(0.7)
    x = torch.randn(2, 16, 5, 7, dtype=dtype)
    y, attention = layer(x, need_weights=True)
    assert y.dtype == attention.dtype == dtype


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.id)
def test_sixteen_bits_are_within_the_noise_of_the_spec(case, dtype):
    given = inputs(case, "float64")
    narrow = {name: array.astype(getattr(ml_dtypes, dtype, dtype)) for name, array in given.params.items()}
    x = given.x.astype(narrow["gamma"].dtype)
    want = spec.forward(
        case.config, {name: array.astype(np.float64) for name, array in narrow.items()}, x.astype(np.float64)
    )
    floor = np.abs(spec.forward(case.config, narrow, x).astype(np.float64) - want).max()
    layer = from_canonical(case.config, narrow)
    assert layer.gamma.dtype == getattr(torch, dtype)
    maps = torch.from_numpy(x.astype(np.float32)).permute(0, 3, 1, 2).to(layer.gamma.dtype)
    error = np.abs(layer(maps).detach().double().permute(0, 2, 3, 1).numpy() - want).max()
    assert error <= 4 * floor + 2 * torch.finfo(layer.gamma.dtype).eps * np.abs(want).max()


def test_autocast_keeps_the_residual_in_the_dtype_of_the_input():
    layer, x, _ = layer_of_case(LAYERS[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, attention = layer(x, need_weights=True)
    assert y.dtype == torch.float32
    assert attention.dtype == torch.bfloat16
    torch.testing.assert_close(y, layer(x), atol=0.1, rtol=0.1)
    layer.gamma.data.zero_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), x)


def test_deferred_creation():
    with torch.device("meta"):
        deferred = SelfAttention2d(16)
    assert deferred.gamma.is_meta
    deferred.to_empty(device="cpu").reset_parameters()
    assert not deferred.gamma.any()
    skipped = nn.utils.skip_init(SelfAttention2d, 16, out_projection=True)
    skipped.load_state_dict(SelfAttention2d(16, out_projection=True).state_dict())
    x = torch.randn(2, 16, 5, 7)
    assert torch.equal(skipped(x), x)


def test_copies_and_native_files():
    layer, x, _ = layer_of_case(POOLED_CASE)
    want = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), want)  # noqa: S301 - our own bytes
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    twin = SelfAttention2d.from_config(POOLED)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(twin(x), want)


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.id)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_canonical_round_trip_is_exact(case, dtype, tmp_path):
    params = {name: array.astype(dtype) for name, array in inputs(case, "float64").params.items()}
    layer = from_canonical(case.config, params)
    assert layer.config == case.config
    back = to_canonical(layer)
    assert list(back) == list(params)
    for name, array in params.items():
        assert back[name].dtype == array.dtype
        assert back[name].tobytes() == array.tobytes(), name
        assert back[name].flags.c_contiguous
        assert back[name].flags.owndata
    save(layer, tmp_path / "layer.safetensors", source="a test")
    loaded = to_canonical(load(tmp_path / "layer.safetensors"))
    assert all(loaded[name].tobytes() == array.tobytes() for name, array in params.items())


def test_canonical_arrays_are_copies():
    given = inputs(LAYERS[0], "float32")
    layer = from_canonical(LAYERS[0].config, given.params)
    arrays = to_canonical(layer)
    arrays["gamma"][0] = 9
    given.params["query.bias"][0] = 9
    assert layer.gamma.item() != 9
    assert layer.query.bias[0].item() != 9


def test_bfloat16_is_exported_as_float32():
    layer = SelfAttention2d(16, dtype=torch.bfloat16)
    arrays = to_canonical(layer)
    assert arrays["query.kernel"].dtype == np.float32
    back = from_canonical(layer.config, arrays, dtype=torch.bfloat16)
    assert torch.equal(back.query.weight, layer.query.weight)


def test_loading_takes_a_dtype_and_leaves_the_random_state_alone(tmp_path):
    save(SelfAttention2d(16), tmp_path / "layer.safetensors")
    torch.manual_seed(3)
    want = torch.rand(3)
    torch.manual_seed(3)
    layer = load(tmp_path / "layer.safetensors", dtype=torch.float64, block_size=7)
    assert torch.equal(torch.rand(3), want)
    assert layer.gamma.dtype == torch.float64
    assert layer.block_size == 7
    assert all(parameter.requires_grad for parameter in layer.parameters())


def test_loading_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path / "absent.safetensors")
    layer = SelfAttention2d(16)
    save(layer, tmp_path / "layer.safetensors")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save(layer, tmp_path / "layer.safetensors")
    with pytest.raises(ValueError, match=r"missing: key\.bias"):
        from_canonical(layer.config, {n: a for n, a in to_canonical(layer).items() if n != "key.bias"})
    layer.gamma.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite: gamma"):
        save(layer, tmp_path / "other.safetensors")


def test_a_file_of_blocks(tmp_path):
    params = inputs(POOLED_CASE, "float32").params
    selfattn_core.save_blocks(tmp_path / "gan.safetensors", dict.fromkeys("gd", (POOLED, params)))
    assert torch.equal(
        load(tmp_path / "gan.safetensors", block="d").out.weight, from_canonical(POOLED, params).out.weight
    )


def test_training_moves_gamma_first():
    torch.manual_seed(0)
    layer, x = SelfAttention2d(16), torch.randn(2, 16, 5, 7)
    target = torch.randn(2, 16, 5, 7)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    (layer(x) - target).square().mean().backward()
    assert layer.gamma.grad.abs() > 0
    assert not layer.query.weight.grad.any()
    optimiser.step()
    optimiser.zero_grad()
    (layer(x) - target).square().mean().backward()
    assert layer.query.weight.grad.any()
