"""The layer as a module among torch's: creation, loading, children, precision, what it dispatches."""

import copy
import inspect
import io
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from selfattn_core import SelfAttentionConfig, parameter_table
from selfattn_core.conformance.verdicts.expected import expect
from selfattn_core.conformance.verdicts.tolerance import judge
from selfattn_core.params import KV_POOL, glorot_limit, projections
from selfattn_torch import SelfAttention2d, to_canonical
from tests.backends.torch.layers import CASE, channels_last, layer_of_case

FLAT, POOLED = CASE["SA-FWD-001"], CASE["SA-FWD-006"]
BOTH = pytest.mark.parametrize("case", [FLAT, POOLED], ids=["flat", "pooled"])


def assert_right(case, y):
    """That y (B, C, H, W) is what the spec gives for the input of the case."""
    verdict = judge("y", channels_last(y), expect(case, "float32")["y"], "float32")
    assert verdict.passed, verdict.message


def test_the_signature_is_frozen():
    expected = (
        "(in_channels: int, qk_channels: int | None = None, value_channels: int | None = None, *, "
        "out_projection: bool = False, bias: bool = True, kv_pool: int = 1, spectral_norm: bool = False, "
        "block_size: int | None = None, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None) -> None"
    )
    assert str(inspect.signature(SelfAttention2d)) == expected


@BOTH
def test_repr_is_a_call_that_makes_the_layer(case):
    layer, *_ = layer_of_case(case)
    arguments = repr(layer).splitlines()[1].strip()
    again = eval(f"SelfAttention2d({arguments})")  # noqa: S307 - our own repr
    assert again.config == case.config


def test_factory_arguments_reach_every_parameter():
    layer = SelfAttention2d(16, 3, 5, out_projection=True, device=torch.device("meta"), dtype=torch.float64)
    assert len(list(layer.parameters())) == 9
    for parameter in layer.parameters():
        assert parameter.is_meta
        assert parameter.dtype == torch.float64
    assert SelfAttention2d.from_config(layer.config, device="meta", dtype=torch.bfloat16).gamma.is_meta


def test_a_model_from_the_meta_device_starts_as_the_table_says():
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Conv2d(3, 256, 3), SelfAttention2d(256, value_channels=128, out_projection=True)
        )
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    arrays = to_canonical(model[1])
    for row in parameter_table(model[1].config).values():
        if row.initial == "zeros":
            assert not arrays[row.name].any(), row.name
        else:
            limit = glorot_limit(*row.shape)
            assert np.abs(arrays[row.name]).max() <= limit
            np.testing.assert_allclose(arrays[row.name].std(), limit / 3**0.5, rtol=0.03)


def test_loading_by_assignment_into_a_meta_layer():
    layer, x, _ = layer_of_case(POOLED)
    state = layer.state_dict()
    empty = SelfAttention2d.from_config(POOLED.config, device="meta")
    empty.load_state_dict(state | {"gamma": state["gamma"].reshape(())}, assign=True)
    assert empty.gamma.shape == (1,)
    assert isinstance(empty.gamma, nn.Parameter)
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1)])
@pytest.mark.parametrize("name", ["gamma", "weight"])
def test_gamma_of_other_shapes_and_names_loads(shape, name):
    state = SelfAttention2d(16).state_dict()
    before = dict(state)
    del state["gamma"]
    state[name] = torch.full(shape, 0.7)
    given = dict(state)
    layer = SelfAttention2d(16)
    layer.load_state_dict(state)
    assert layer.gamma.shape == (1,)
    assert layer.gamma.item() == state[name].item()
    assert torch.equal(layer.query.weight, before["query.weight"])
    model = nn.Sequential(OrderedDict(first=nn.Identity(), attention=SelfAttention2d(16)))
    model.load_state_dict({f"attention.{key}": value for key, value in state.items()})
    assert model.attention.gamma.item() == state[name].item()
    # What the caller passes stays as it was.
    assert state.keys() == given.keys()
    assert state[name].shape == shape


def test_a_gamma_per_channel_and_two_gammas_are_refused():
    layer = SelfAttention2d(16)
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for gamma.*torch\.Size\(\[16\]\)"):
        layer.load_state_dict(state | {"gamma": torch.ones(16)})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight"'):
        layer.load_state_dict(state | {"weight": torch.ones(1)})


def test_the_version_of_the_state_dict_is_frozen():
    metadata = nn.Sequential(SelfAttention2d(16)).state_dict()._metadata
    assert metadata["0"] == {"version": 1, KV_POOL: 1}


@BOTH
def test_copies_keep_the_migration(case):
    layer, x, _ = layer_of_case(case)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),  # noqa: S301 - our own bytes
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(twin(x), layer(x))
        twin.load_state_dict(layer.state_dict() | {"gamma": torch.tensor(0.25)})
        assert twin.gamma.item() == 0.25
    assert layer.gamma.item() != 0.25


@BOTH
def test_channels_last_stays_and_is_not_made(case):
    layer, x, _ = layer_of_case(case)
    for maps, memory_format in (
        (x.contiguous(memory_format=torch.channels_last), torch.channels_last),
        (x.contiguous(), torch.contiguous_format),
    ):
        y = layer(maps)
        assert y.is_contiguous(memory_format=memory_format)
        assert_right(case, y)
    model = layer.to(memory_format=torch.channels_last)
    assert_right(case, model(x))


@BOTH
def test_an_empty_batch_has_empty_results_and_gradients_of_zero(case):
    layer, x, _ = layer_of_case(case)
    empty = x[:0].clone().requires_grad_()
    y, attention = layer(empty, need_weights=True)
    assert y.shape == empty.shape
    assert attention.shape[0] == 0
    layer(empty).sum().backward()
    assert empty.grad.shape == empty.shape
    assert all(not parameter.grad.any() for parameter in layer.parameters())


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(case, dtype):
    layer, x, _ = layer_of_case(case)
    exact = layer(x)
    with torch.autocast("cpu", dtype=dtype):
        y, attention = layer(x, need_weights=True)
        again = layer(x)
        narrow = layer(x.to(dtype))
    # The residual keeps the dtype of x, where a module in the dtype of autocast rounds it; the rest is that module's.
    assert (y.dtype, again.dtype, attention.dtype, narrow.dtype) == (
        torch.float32,
        torch.float32,
        dtype,
        torch.float32,
    )
    size = (exact - x).abs().max()
    eps = torch.finfo(dtype).eps
    assert torch.equal(y, again)
    assert (y - exact).abs().max() <= 4 * eps * size
    cast = copy.deepcopy(layer).to(dtype)
    assert torch.equal(attention, cast(x.to(dtype), need_weights=True)[1])


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast(case, dtype):
    layer, x, _ = layer_of_case(case)
    x.requires_grad_()

    def step():
        y = layer(x)
        (slope,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        return torch.autograd.grad(y.square().mean() + slope.square().mean(), layer.parameters())

    exact = step()
    with torch.autocast("cpu", dtype=dtype):
        rounded = step()
    for parameter, got, want in zip(layer.parameters(), rounded, exact, strict=True):
        assert got.dtype == parameter.dtype == torch.float32
        assert (got - want).abs().max() <= 16 * torch.finfo(dtype).eps * max(w.abs().max() for w in exact)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_module_of_another_dtype_trains(case, dtype):
    layer, x, _ = layer_of_case(case)
    layer.to(dtype)
    maps = x.to(dtype).requires_grad_()
    layer(maps).square().mean().backward()
    for tensor in (maps, *layer.parameters()):
        assert tensor.grad.dtype == dtype
        assert tensor.grad.isfinite().all()
        assert tensor.grad.any()


class Operators(TorchDispatchMode):
    """Keeps the names of the operators that reach the dispatcher, those of backward passes included."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))

    def fused(self):
        return {name for name in self.names if "attention" in name}


class Functions(TorchFunctionMode):
    """Keeps the names of torch's functions, which attention that is decomposed would not outlive."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.add(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))

    def fused(self):
        return {name for name in self.names if "attention" in name}


@BOTH
@pytest.mark.parametrize("block_size", [None, 4])
def test_no_fused_attention_kernel_is_called(case, block_size):
    layer, x, _ = layer_of_case(case)
    layer.block_size = block_size
    x.requires_grad_()
    with Operators() as operators, Functions() as functions:
        y = layer(x, need_weights=True)[0] + layer(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        slope.square().sum().backward()
        assert operators.fused() == functions.fused() == set()
        # One call, to see that they would have seen it.
        nn.functional.scaled_dot_product_attention(*torch.ones(3, 1, 1, 2, 4).unbind())
    assert operators.fused()
    assert functions.fused()


class LowRank(nn.Module):
    """A child as adapters wrap it: the frozen base and a trained product of two narrow convolutions."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.down = nn.Conv2d(base.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


@pytest.mark.parametrize(
    ("case", "name"), [(case, name) for case in (FLAT, POOLED) for name in projections(case.config)]
)
def test_children_are_called_so_that_they_can_be_hooked_and_replaced(case, name):
    layer, x, _ = layer_of_case(case)
    layer.requires_grad_(False)
    wrapped = LowRank(layer.get_submodule(name))
    setattr(layer, name, wrapped)
    merged, *_ = layer_of_case(case)
    with torch.no_grad():
        product = torch.einsum("orij,rcij->ocij", wrapped.up.weight, wrapped.down.weight)
        merged.get_submodule(name).weight += product
    y = layer(x)
    assert not torch.allclose(y, layer_of_case(case)[0](x), atol=1e-4)
    torch.testing.assert_close(y, merged(x), rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    assert wrapped.up.weight.grad.any()
    with pytest.raises(
        ValueError, match=f"with these problems: {name} is a LowRank. Expected plain convolutions"
    ):
        to_canonical(layer)

    hooked, *_ = layer_of_case(case)
    hooked.get_submodule(name).register_forward_hook(lambda *given: given[-1] * 0)
    assert not torch.allclose(hooked(x), layer_of_case(case)[0](x), atol=1e-4)


@BOTH
def test_spectral_norm_from_outside(case):
    layer, x, _ = layer_of_case(case)
    names = [name for name, _ in layer.named_children()]
    kernels = {name: layer.get_submodule(name).weight.detach().clone() for name in names}
    for name in names:
        nn.utils.parametrizations.spectral_norm(layer.get_submodule(name))
    layer.train()
    x.requires_grad_()
    (slope,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    slope.square().sum().backward()
    layer.eval()
    plain, *_ = layer_of_case(case)
    with torch.no_grad():
        for name in names:
            child = layer.get_submodule(name)
            assert child.parametrizations.weight.original.grad.any()
            torch.testing.assert_close(
                torch.linalg.matrix_norm(child.weight[:, :, 0, 0], 2), torch.tensor(1.0), rtol=0.05, atol=0
            )
            plain.get_submodule(name).weight.copy_(child.weight)
            assert not torch.equal(child.weight, kernels[name])
        # Not bit for bit: plain children are computed as one product.
        torch.testing.assert_close(layer(x), plain(x))
    with pytest.raises(ValueError, match=r"query is a Parametrized\w+, key is .*remove_parametrizations"):
        to_canonical(layer)
    for name in names:
        nn.utils.parametrize.remove_parametrizations(layer.get_submodule(name), "weight")
    assert np.array_equal(to_canonical(layer)["key.kernel"], to_canonical(plain)["key.kernel"])


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.spectral_norm.*:FutureWarning")
def test_a_weight_that_a_hook_computes_is_not_exported():
    layer, *_ = layer_of_case(FLAT)
    nn.utils.spectral_norm(layer.key)
    with pytest.raises(ValueError, match="the weight of key is computed by a hook"):
        to_canonical(layer)


def test_a_plain_convolution_in_place_of_a_child_is_exported():
    layer, *_ = layer_of_case(FLAT)
    layer.key = nn.Conv2d(24, 3, 1)
    assert np.array_equal(to_canonical(layer)["key.bias"], layer.key.bias.detach())


def test_in_a_sequential_the_output_is_a_tensor():
    layer, x, _ = layer_of_case(FLAT)
    model = nn.Sequential(layer, nn.ReLU())
    assert torch.equal(model(x), layer(x).relu())


def test_config_survives_what_changes_the_parameters():
    layer = (
        SelfAttention2d.from_config(SelfAttentionConfig.pooled(16))
        .double()
        .to(memory_format=torch.channels_last)
    )
    assert layer.config == SelfAttentionConfig.pooled(16)
