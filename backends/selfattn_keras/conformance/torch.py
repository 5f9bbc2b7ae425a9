"""The layer's functions on PyTorch."""

import torch

from selfattn_keras.conformance.model import Model
from selfattn_keras.layer import Tensor

__all__ = ["attention", "forward", "r1", "vjp", "vjp_of_vjp"]


def forward(model: Model, x: Tensor) -> Tensor:
    """The output y."""
    return model.layer(x)


def attention(model: Model, x: Tensor) -> Tensor:
    """The map A."""
    return model.layer(x, return_attention_scores=True)[1]


def _sources(model: Model, x: Tensor) -> list[Tensor]:
    return [x.requires_grad_(), *model.values]


def vjp(model: Model, x: Tensor, dy: Tensor, training: bool = False) -> list[Tensor]:
    """The gradients of sum(dy∘y) for x and each parameter."""
    sources = _sources(model, x)
    y = model.layer(x, training=training)
    return list(torch.autograd.grad(y, sources, dy, materialize_grads=True))


def r1(model: Model, x: Tensor, w: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The penalty ‖d sum(w∘y)/dx‖² and its gradients for x and each parameter."""
    sources = _sources(model, x)
    (dx,) = torch.autograd.grad(model.layer(x), x, w, create_graph=True)
    penalty = dx.square().sum()
    return penalty.detach(), list(torch.autograd.grad(penalty, sources, materialize_grads=True))


def vjp_of_vjp(model: Model, x: Tensor, dy: Tensor, cotangents: list[Tensor]) -> list[Tensor]:
    """The gradients of Σ sum(cotangent∘gradient) for dy, x and each parameter."""
    sources = _sources(model, x)
    dy.requires_grad_()
    first = torch.autograd.grad(model.layer(x), sources, dy, create_graph=True, materialize_grads=True)
    total = torch.stack([(c * g).sum() for c, g in zip(cotangents, first, strict=True)]).sum()
    return list(torch.autograd.grad(total, [dy, *sources], materialize_grads=True))
