"""A whole network of PyTorch before and after `convert`."""

import copy

import torch

from selfattn_core.conformance.verdicts.tolerance import FACTOR

__all__ = ["check_network"]


def check_network(given, old, new):
    """Within the kit's factor of what float32 does to the old network by itself, in output and gradients.

    The gradients are those of the first input that is differentiable, and of every parameter that both networks have.

    Args:
        given: the inputs; those of a floating-point dtype are cast to that of the network.
        old: the network before.
        new: the network after.
    """
    wide, narrow = (_answers(given, old, dtype) for dtype in (torch.float64, torch.float32))
    found = _answers(given, new, torch.float32)
    common = [name for name in wide if name in found]
    assert {"y", "x"} < set(common)
    for name in common:
        want = wide[name]
        # An error of a single draw can be small by luck.
        floor = (narrow[name].double() - want).abs().max() + torch.finfo(torch.float32).eps * want.abs().max()
        if floor > want.abs().max():
            # Zero, as the gradient of a key's bias: rounding alone, which `convert` itself compares with what cancels.
            continue
        error = (found[name].double() - want).abs().max()
        assert error <= FACTOR * floor, f"{name}: {error / floor:.3g} noise floors"


def _answers(given, network, dtype):
    computed = [
        value
        for module in network.modules()
        for value in vars(module).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    ]
    network = copy.deepcopy(network, {id(value): value.detach() for value in computed}).to(dtype).eval()
    cast = [
        each.to(dtype) if isinstance(each, torch.Tensor) and each.is_floating_point() else each
        for each in given
    ]
    cast[0] = cast[0].clone().requires_grad_()
    y = network(*cast)
    generator = torch.Generator().manual_seed(6)
    y.backward(torch.randn(y.shape, generator=generator).to(dtype))
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    held = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    return {"y": y.detach(), "x": cast[0].grad} | held
