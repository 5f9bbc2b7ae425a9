"""The layer under `torch.func`, forward mode, gradcheck and batched gradients."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from selfattn_core import SelfAttentionConfig
from selfattn_torch import SelfAttention2d
from tests.backends.torch.layers import CASE, layer_of_case

FLAT, POOLED = CASE["SA-FWD-001"], CASE["SA-FWD-006"]
BOTH = pytest.mark.parametrize("case", [FLAT, POOLED], ids=["flat", "pooled"])
# In one block the layer is torch's own operators; with a block size it is our derivatives.
BLOCKS = pytest.mark.parametrize("block_size", [None, 4])

# torch's own forward mode compiles its decompositions on first use.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script")


def assert_close(got, want):
    """Equal but for the order of float64 sums."""
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@forward_mode
@pytest.mark.parametrize(
    ("config", "size"),
    [
        (SelfAttentionConfig(8, 2), (2, 3)),
        (SelfAttentionConfig(5, 2, 3, out_projection=True, kv_pool=2), (3, 4)),
    ],
    ids=["flat", "pooled"],
)
@pytest.mark.parametrize("block_size", [None, 2])
def test_gradcheck_and_gradgradcheck(config, size, block_size):
    torch.manual_seed(0)
    layer = SelfAttention2d.from_config(config, block_size=block_size, dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    for parameter in parameters:
        nn.init.normal_(parameter, 0.3, 0.6)
    x = torch.randn(2, config.channels, *size, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, (x, *parameters), check_fwd_over_rev=True, fast_mode=True)


@BOTH
@BLOCKS
def test_vmap_over_samples_and_over_inputs(case, block_size):
    layer, x, _ = layer_of_case(case, "float64", block_size=block_size)
    assert_close(vmap(layer)(x), layer(x))
    stacked = torch.stack([x, -x, x.flip(0)])
    assert_close(vmap(layer)(stacked), torch.stack([layer(maps) for maps in stacked]))
    y, attention = vmap(lambda maps: layer(maps, need_weights=True), out_dims=(0, 1))(stacked)
    assert attention.shape[1] == 3
    assert_close(attention[:, 2], layer(stacked[2], need_weights=True)[1])
    assert_close(y[1], layer(stacked[1]))


@BOTH
@BLOCKS
def test_gradients_of_every_sample(case, block_size):
    layer, x, _ = layer_of_case(case, "float64", block_size=block_size)
    parameters = dict(layer.named_parameters())
    targets = x.flip(3)

    def loss(parameters, sample, target):
        return (functional_call(layer, parameters, (sample,)) - target).square().sum()

    got = vmap(grad(loss), in_dims=(None, 0, 0))({n: p.detach() for n, p in parameters.items()}, x, targets)
    for index in range(len(x)):
        want = torch.autograd.grad(loss(parameters, x[index], targets[index]), list(parameters.values()))
        for name, value in zip(parameters, want, strict=True):
            assert_close(got[name][index], value)


@BOTH
@BLOCKS
def test_the_penalty_of_every_sample(case, block_size):
    layer, x, _ = layer_of_case(case, "float64", block_size=block_size)

    def penalty(sample):
        return grad(lambda maps: layer(maps).sin().sum())(sample).square().sum()

    got = vmap(penalty)(x)
    maps = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(layer(maps).sin().sum(), maps)
    assert_close(got, slope.square().flatten(1).sum(1))
    gradients = grad(lambda maps: vmap(penalty)(maps).sum())(x)
    (slope,) = torch.autograd.grad(layer(maps).sin().sum(), maps, create_graph=True)
    assert_close(gradients, torch.autograd.grad(slope.square().sum(), maps)[0])


@BOTH
@BLOCKS
def test_an_ensemble(case, block_size):
    layers = [layer_of_case(case, "float64", block_size=block_size)[0] for _ in range(3)]
    for scale, layer in enumerate(layers, 1):
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(0.4 * scale)
    _, x, _ = layer_of_case(case, "float64")
    parameters, buffers = stack_module_state(layers)
    skeleton = copy.deepcopy(layers[0]).to("meta")
    run = vmap(
        lambda parameters, buffers, x: functional_call(skeleton, (parameters, buffers), (x,)), (0, 0, None)
    )
    got = run(parameters, buffers, x)
    assert_close(got, torch.stack([layer(x) for layer in layers]))
    got.square().sum().backward()
    sum(layer(x).square().sum() for layer in layers).backward()
    for name, stacked in parameters.items():
        assert_close(stacked.grad, torch.stack([layer.get_parameter(name).grad for layer in layers]))


@forward_mode
@BOTH
@BLOCKS
def test_tangents(case, block_size):
    layer, x, _ = layer_of_case(case, "float64", block_size=block_size)
    direction = x.flip(2)
    _, tangent = jvp(layer, (x,), (direction,))
    cotangent = x.flip(3)
    (pulled,) = vjp(layer, x)[1](cotangent)
    assert tangent.abs().max() > 0.1
    assert_close((tangent * cotangent).sum(), (direction * pulled).sum())
    step = 1e-6
    difference = (layer(x + step * direction) - layer(x - step * direction)) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-6)

    def slope(maps):
        return grad(lambda maps: layer(maps).sin().sum())(maps)

    # Forward over reverse, against reverse over reverse: both are products with the symmetric Hessian.
    _, forward = jvp(slope, (x,), (direction,))
    assert_close(forward, vjp(slope, x)[1](direction)[0])


@forward_mode
@BLOCKS
def test_jacobians(block_size):
    layer, x, _ = layer_of_case(POOLED, "float64", block_size=block_size)
    sample = x[0, :, :2, :3].contiguous()
    assert_close(jacfwd(layer)(sample), jacrev(layer)(sample))


@BOTH
@BLOCKS
def test_batched_gradients(case, block_size):
    layer, x, _ = layer_of_case(case, "float64", block_size=block_size)
    x = x.clone().requires_grad_()
    sources = [x, *layer.parameters()]
    cotangents = torch.stack([x.detach().flip(3), x.detach().flip(2), -x.detach()])
    y = layer(x)
    got = torch.autograd.grad(y, sources, cotangents, is_grads_batched=True, create_graph=True)
    for index, cotangent in enumerate(cotangents):
        want = torch.autograd.grad(y, sources, cotangent, retain_graph=True)
        for batched, value in zip(got, want, strict=True):
            assert_close(batched[index], value)
    # And the second derivative of a batch of first ones.
    second = torch.autograd.grad(got[0].square().sum(), x, retain_graph=True)[0]
    slopes = [torch.autograd.grad(y, x, cotangent, create_graph=True)[0] for cotangent in cotangents]
    assert_close(second, torch.autograd.grad(sum(slope.square().sum() for slope in slopes), x)[0])


@forward_mode
def test_spectral_norm_in_training_takes_its_buffers_as_arguments():
    """Captured ones cannot be written inside a transform of torch.func."""
    torch.manual_seed(0)
    layer = SelfAttention2d(11, 3, spectral_norm=True, dtype=torch.float64)
    nn.init.constant_(layer.gamma, 0.7)
    x = torch.randn(2, 11, 3, 5, dtype=torch.float64)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    buffers = dict(layer.named_buffers())
    eager = copy.deepcopy(layer)
    eager(x).sin().sum().backward()

    def loss(parameters, x):
        moved = {name: buffer.clone() for name, buffer in buffers.items()}
        return functional_call(layer, (parameters, moved), (x,)).sin().sum(), moved

    gradients, moved = grad(loss, has_aux=True)(parameters, x)
    for name, parameter in eager.named_parameters():
        assert_close(gradients[name], parameter.grad)
    for name, buffer in eager.named_buffers():
        assert_close(moved[name], buffer)
        assert not torch.equal(buffers[name], buffer)
    _, tangent = jvp(lambda x: loss(parameters, x)[0], (x,), (x.flip(2),))
    (slope,) = vjp(lambda x: loss(parameters, x)[0], x)[1](torch.ones((), dtype=x.dtype))
    assert_close(tangent, (slope * x.flip(2)).sum())
    # A sample alone has the same estimate, which reads weights only.
    each = vmap(grad(lambda x: loss(parameters, x)[0]))(x)
    assert_close(each, slope)
    with pytest.raises(RuntimeError, match="in-place operation"):
        grad(lambda x: layer(x).sum())(x)
    layer.eval()
    assert grad(lambda x: layer(x).sin().sum())(x).shape == x.shape
