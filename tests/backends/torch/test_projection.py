"""Query, key and value in one product: only where nobody can tell, and every child that is not plain is called."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from selfattn_core import SelfAttentionConfig
from selfattn_core.conformance.cases.table import CASES
from selfattn_torch import SelfAttention2d, projection
from selfattn_torch.projection import project
from tests.backends.torch.layers import layer_of_case

FLAT, POOLED = (
    next(case for case in CASES if case.family == "params" and case.config == config)
    for config in (SelfAttentionConfig(24), SelfAttentionConfig.pooled(16))
)


class Doubled(nn.Module):
    """What LoRA and quantisation do: another module around the one that was there."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, maps):
        return 2 * self.inner(maps)


class Shifted(nn.Conv2d):
    def forward(self, maps):
        return super().forward(maps) + 1


def count(monkeypatch):
    calls = []
    convolve = nn.functional.conv2d
    monkeypatch.setattr(
        nn.functional, "conv2d", lambda *args, **kwargs: calls.append(args) or convolve(*args, **kwargs)
    )
    return calls


@pytest.mark.parametrize("flat", [False, True], ids=["maps", "positions"])
@pytest.mark.parametrize("tiny", [True, False], ids=["convolution", "product"])
@pytest.mark.parametrize("case", [FLAT, POOLED], ids=["flat", "pooled"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_children_together_give_what_each_gives(monkeypatch, case, layout, tiny, flat):
    layer, x, _ = layer_of_case(case, "float64")
    x = x.contiguous(memory_format=layout).requires_grad_()
    children = layer.query, layer.key, layer.value
    want = [child(x).flatten(2) if flat else child(x) for child in children]
    monkeypatch.setattr(projection, "_TINY", x.numel() if tiny else x.numel() - 1)
    calls = count(monkeypatch)
    got = project(x, *children, flat=flat)
    # Tiny maps are joined for their derivatives, unless pooling follows, which would copy its part.
    assert len(calls) == ((1 if flat else 3) if tiny else 0)
    parameters = [x, *(parameter for child in children for parameter in child.parameters())]
    cotangents = [torch.randn_like(each) for each in want]
    expected = torch.autograd.grad(want, parameters, cotangents)
    gradients = torch.autograd.grad(got, parameters, cotangents)
    for one, other in zip([*got, *gradients], [*want, *expected], strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("flat", [False, True], ids=["maps", "positions"])
@pytest.mark.parametrize("case", [FLAT, POOLED], ids=["flat", "pooled"])
def test_kernels_of_tiny_maps_are_not_joined_without_derivatives(monkeypatch, case, flat):
    layer, x, _ = layer_of_case(case, "float64")
    children = layer.query, layer.key, layer.value
    want = [child(x).flatten(2) if flat else child(x) for child in children]
    calls = count(monkeypatch)
    with torch.no_grad():
        got = project(x, *children, flat=flat)
    assert len(calls) == 3
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shape", "dtype", "convolutions"),
    [
        ((1, 16, 2, 3), "float32", 1),
        ((1, 16, 2, 3), "bfloat16", 0),
        ((1, 16, 40, 41), "float32", 0),
        # A kernel's gradient for each of 500 samples would be larger than two inputs.
        ((500, 16, 2, 3), "float32", 1),
        ((500, 16, 2, 5), "float32", 0),
    ],
)
def test_a_product_where_it_is_faster_and_takes_no_more_memory(monkeypatch, shape, dtype, convolutions):
    layer = SelfAttention2d(16, dtype=getattr(torch, dtype))
    calls = count(monkeypatch)
    project(torch.randn(shape).to(layer.gamma.dtype), layer.query, layer.key, layer.value, flat=True)
    assert len(calls) == convolutions


@pytest.mark.parametrize("tiny", [True, False])
def test_the_child_out_is_a_product_too(monkeypatch, tiny):
    layer, x, _ = layer_of_case(POOLED, "float64")
    monkeypatch.setattr(projection, "_TINY", 2**14 if tiny else 0)
    calls = count(monkeypatch)
    layer(x)
    assert len(calls) == (4 if tiny else 0)


def test_wide_maps_are_projected_by_each_child(monkeypatch):
    layer = SelfAttention2d(512)
    calls = count(monkeypatch)
    layer(torch.randn(1, 512, 2, 3))
    assert len(calls) == 3


def doubling(_module, _args, output):
    return 2 * output


def change_by_hook(layer):
    layer.key.register_forward_hook(doubling)


def change_by_pre_hook(layer):
    layer.key.register_forward_pre_hook(lambda _module, args: (2 * args[0],))


def change_by_forward(layer):
    inner = layer.key.forward
    layer.key.forward = lambda maps: 2 * inner(maps)


def change_by_wrapping(layer):
    layer.key = Doubled(layer.key)


def change_by_subclass(layer):
    shifted = Shifted(*layer.key.weight.shape[1::-1], 1, dtype=torch.float64)
    shifted.load_state_dict(layer.key.state_dict())
    layer.key = shifted


def change_by_parametrization(layer):
    nn.utils.parametrizations.spectral_norm(layer.key)


def change_by_kernel_size(layer):
    width, channels = layer.key.weight.shape[:2]
    layer.key = nn.Conv2d(channels, width, 3, padding=1, dtype=torch.float64)


def change_by_kernel_without_padding(layer):
    width, channels = layer.key.weight.shape[:2]
    layer.key = nn.Conv2d(channels, width, 3, dtype=torch.float64)


def change_by_stride(layer):
    width, channels = layer.key.weight.shape[:2]
    layer.key = nn.Conv2d(channels, width, 1, stride=2, dtype=torch.float64)


def change_by_padding(layer):
    width, channels = layer.key.weight.shape[:2]
    layer.key = nn.Conv2d(channels, width, 1, padding=1, dtype=torch.float64)


def change_by_bias(layer):
    layer.key.bias = None


CHANGES = [change for name, change in globals().items() if name.startswith("change_by_")]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.removeprefix("change_by_"))
def test_a_child_that_is_not_plain_is_called(change):
    layer, x, _ = layer_of_case(FLAT, "float64")
    # The function without any fusing: the layer's own children, called.
    change(layer)
    layer.eval()
    reference = copy.copy(layer)
    got = project(x, layer.query, layer.key, layer.value, flat=False)
    want = [child(x) for child in (reference.query, reference.key, reference.value)]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_pre_hook",
        "register_forward_hook",
        "register_full_backward_pre_hook",
        "register_full_backward_hook",
    ],
)
def test_hooks_see_their_calls(register):
    layer, x, _ = layer_of_case(FLAT, "float64")
    seen = []
    getattr(layer.value, register)(lambda *_: seen.append(register))
    layer(x.requires_grad_()).sum().backward()
    assert seen == [register]


def test_a_hook_on_all_modules_sees_the_children():
    layer, x, _ = layer_of_case(FLAT, "float64")
    seen = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        layer(x)
    finally:
        handle.remove()
    assert {layer.query, layer.key, layer.value} < set(seen)


def test_replaced_weights_are_used():
    layer, x, _ = layer_of_case(FLAT, "float64")
    state = {name: 2 * value for name, value in layer.state_dict().items()}
    changed = copy.deepcopy(layer)
    changed.load_state_dict(state)
    got = torch.func.functional_call(layer, state, (x,))
    torch.testing.assert_close(got, changed(x), rtol=1e-12, atol=1e-12)
