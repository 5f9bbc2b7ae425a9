"""What optimisers do to gamma, which is one number that starts at zero, and the groups of docs/gan-training.md."""

import copy

import pytest
import torch
from torch import nn

from selfattn_torch import SelfAttention2d


@pytest.mark.parametrize("shape", ["gamma", "kernel"])
def test_muon_of_torch_refuses_gamma_and_kernels(shape):
    layer = SelfAttention2d(16)
    parameter = layer.gamma if shape == "gamma" else layer.value.weight
    with pytest.raises(ValueError, match="only supports 2D"):
        torch.optim.Muon([parameter], 1e-3)


def test_weight_decay_shrinks_gamma_unless_its_group_has_none():
    def gamma(decay_of_vectors):
        torch.manual_seed(0)
        layer = SelfAttention2d(16, spectral_norm=True)
        teacher = copy.deepcopy(layer).eval()
        nn.init.ones_(teacher.gamma)
        nn.init.ones_(layer.gamma)
        groups = [
            {"params": [p for p in layer.parameters() if p.ndim > 1], "weight_decay": 0.01},
            {"params": [p for p in layer.parameters() if p.ndim <= 1], "weight_decay": decay_of_vectors},
        ]
        sgd = torch.optim.SGD(groups, 0.1, momentum=0.9)
        for _ in range(100):
            x = torch.randn(4, 16, 5, 3)
            loss = (layer(x) - teacher(x)).square().mean()
            sgd.zero_grad()
            loss.backward()
            sgd.step()
        return layer.gamma.item()

    assert gamma(0.01) < 0.8
    assert gamma(0.0) > 0.95


def test_a_step_in_proportion_to_the_size_holds_gamma_at_one_rate():
    """By the same gradient at every step; the groups give gamma Adam's steps instead."""
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")

    params = {"gamma": jax.numpy.zeros(1), "kernel": jax.numpy.ones((3, 2))}
    gradients = {"gamma": -jax.numpy.ones(1), "kernel": jax.numpy.ones((3, 2))}
    rate, steps = 1e-3, 100

    def gamma(optimizer):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        end, _ = jax.lax.scan(step, (params, optimizer.init(params)), None, steps)
        return float(end[0]["gamma"][0])

    def kinds(params):
        return jax.tree.map(lambda leaf: "kernels" if leaf.ndim > 1 else "vectors", params)

    assert gamma(optax.lamb(rate)) == pytest.approx(rate * (1 + rate) ** (steps - 1), rel=1e-3)
    grouped = optax.partition({"kernels": optax.lamb(rate), "vectors": optax.adam(rate)}, kinds)
    assert gamma(grouped) == pytest.approx(rate * steps, rel=1e-3)
