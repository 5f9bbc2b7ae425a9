"""Mutants of spectral norm: bugs in its derivatives, and in the state after a training pass."""

from dataclasses import replace
from typing import Any

import numpy as np

from selfattn_core import spec
from selfattn_core.arrays import Array
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.conformance.cases.families import FamilyName
from selfattn_core.conformance.mutants.mutant import Mutant, edited, named
from selfattn_core.conformance.reference import Model, Reference
from selfattn_core.params import fold_spectral_norm, init_params, projections

__all__ = ["MUTANTS"]


_FAMILY: FamilyName = "spectral_norm"


class StateStays(Reference):
    def training_pass(self, model: Model, x: Array) -> dict[str, Array]:
        return {"y": self.forward(model, x), **model.params}


class StateMovesTwice(Reference):
    def training_pass(self, model: Model, x: Array) -> dict[str, Array]:
        return super().training_pass(
            replace(model, params=spec.power_iteration(model.config, model.params)), x
        )


class OutputOfTheOldState(Reference):
    def training_pass(self, model: Model, x: Array) -> dict[str, Array]:
        y = self.forward(model, x)
        return super().training_pass(model, x) | {"y": y}


class KernelOverwritten(Reference):
    """Replaces the raw kernel by the normalised one, as Keras and Flax do."""

    def training_pass(self, model: Model, x: Array) -> dict[str, Array]:
        answer = super().training_pass(model, x)
        moved = {name: answer[name] for name in model.params}
        kernels = fold_spectral_norm(model.config, moved)[1]
        return answer | {name: array for name, array in kernels.items() if name.endswith("kernel")}


class IteratesFromU(Reference):
    """Updates v first, from the stored u, as many implementations do. Both orders converge to the norm."""

    def training_pass(self, model: Model, x: Array) -> dict[str, Array]:
        params = dict(model.params)
        for name in projections(model.config) if model.config.spectral_norm else ():
            v = params[f"{name}.kernel"] @ params[f"{name}.u"]
            v = v / np.linalg.norm(v)
            u = v @ params[f"{name}.kernel"]
            params |= {f"{name}.v": v, f"{name}.u": u / np.linalg.norm(u)}
        return {"y": self.forward(replace(model, params=params), x), **params}


class StateNotExported(Reference):
    def params(self, model: Model) -> dict[str, Array]:
        return {name: array for name, array in model.params.items() if name[-2:] not in (".u", ".v")}


class IteratesInEvaluation(Reference):
    """Adds one power iteration to each evaluation, and does not store it."""

    def forward(self, model: Model, x: Array) -> Array:
        return super().forward(replace(model, params=spec.power_iteration(model.config, model.params)), x)


class KnowsItsWeights(Reference):
    """Holds the weights and the state of the layer that it built last, outside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, Array] = {}

    def build(self, *arguments: Any) -> Model:
        model = super().build(*arguments)
        self.held = dict(model.params)
        return model


class MovesInEvaluation(KnowsItsWeights):
    """Moves the state at every call."""

    def forward(self, model: Model, x: Array) -> Array:
        y = super().forward(replace(model, params=self.held), x)
        self.held = spec.power_iteration(model.config, self.held)
        return y

    def training_pass(self, model: Model, x: Array) -> dict[str, Array]:
        self.held = spec.power_iteration(model.config, self.held)
        return {"y": Reference.forward(self, replace(model, params=self.held), x), **self.held}

    def params(self, model: Model) -> dict[str, Array]:  # noqa: ARG002 - the state is kept here
        return self.held


class MovesWithGradients(MovesInEvaluation):
    """Moves the state in evaluation when the gradient is computed."""

    def forward(self, model: Model, x: Array) -> Array:
        return Reference.forward(self, replace(model, params=self.held), x)

    def vjp(self, model: Model, x: Array, dy: Array) -> dict[str, Array]:
        gradients = super().vjp(replace(model, params=self.held), x, dy)
        self.held = spec.power_iteration(model.config, self.held)
        return gradients


class ThroughTheIteration(Reference):
    """Differentiates through the power iteration, as if u and v were not constants. It uses differences of the loss."""

    def training_vjp(self, model: Model, x: Array, dy: Array) -> dict[str, Array]:
        wide = {name: array.astype(np.float64) for name, array in model.params.items()}

        def loss(name: str, change: Array) -> float:
            moved = spec.power_iteration(model.config, {**wide, name: wide[name] + change})
            y = spec.forward(model.config, moved, x.astype(np.float64))
            return float(np.sum(dy * y))

        gradients = super().training_vjp(model, x, dy)
        for name in (f"{projection}.kernel" for projection in projections(model.config)):
            steps = 1e-5 * np.eye(wide[name].size).reshape(-1, *wide[name].shape)
            slopes = [(loss(name, step) - loss(name, -step)) / 2e-5 for step in steps]
            gradients[name] = np.array(slopes, x.dtype).reshape(wide[name].shape)
        return gradients


class StateAsBefore(Reference):
    """Computes the derivatives of a training pass with the state before it."""

    def training_vjp(self, model: Model, x: Array, dy: Array) -> dict[str, Array]:
        return self.vjp(model, x, dy)


class BeginsAnew(KnowsItsWeights):
    """Every training pass starts from the state that the layer was built with."""

    def training_pass(self, model: Model, x: Array) -> dict[str, Array]:
        model.params.update(self.held)
        return super().training_pass(model, x)


class KeepsTheNorm(KnowsItsWeights):
    """Computes in evaluation with the norm of the state that the layer was built with."""

    def forward(self, model: Model, x: Array) -> Array:
        return super().forward(replace(model, params=self.held), x)

    def training_pass(self, model: Model, x: Array) -> dict[str, Array]:
        model.params.update(spec.power_iteration(model.config, model.params))
        return {"y": Reference.forward(self, model, x), **self.params(model)}


class PassNotKept(Reference):
    """A training pass returns the right state, and the layer keeps the state before it."""

    def training_pass(self, model: Model, x: Array) -> dict[str, Array]:
        return super().training_pass(replace(model, params=dict(model.params)), x)


class SavesWithoutState(Reference):
    def saved(self, model: Model, folder: str) -> Model:
        loaded = super().saved(model, folder)
        fresh = init_params(model.config, 0, model.params["gamma"].dtype)
        state = {name: fresh[name] for name in model.params if name[-2:] in (".u", ".v")}
        return replace(loaded, params={**loaded.params, **state})


class StateOfNoKernel(Reference):
    """u and v of unit length, without a power iteration."""

    def initial(self, config: SelfAttentionConfig, seed: int) -> dict[str, Array]:
        drawn = super().initial(config, seed)
        state = {name: array for name, array in drawn.items() if name[-2:] in (".u", ".v")}
        flat = {name: np.full_like(array, array.size**-0.5) for name, array in state.items()}
        return drawn | flat


class DeadState(Reference):
    """The state of a kernel of zeros becomes zero and remains zero."""

    def training_pass(self, model: Model, x: Array) -> dict[str, Array]:
        answer = super().training_pass(model, x)
        for name in projections(model.config) if model.config.spectral_norm else ():
            if not model.params[f"{name}.kernel"].any():
                answer |= {f"{name}.{part}": 0 * answer[f"{name}.{part}"] for part in ("u", "v")}
        return answer


class StateLeftAtZero(Reference):
    """The state of a kernel of zeros does not change, so it may be orthogonal to the later kernel."""

    def training_pass(self, model: Model, x: Array) -> dict[str, Array]:
        before = dict(model.params)
        answer = super().training_pass(model, x)
        for name in projections(model.config) if model.config.spectral_norm else ():
            if not before[f"{name}.kernel"].any():
                answer |= {f"{name}.{part}": before[f"{name}.{part}"] for part in ("u", "v")}
        return answer


_BACK = "return np.asarray((dW - np.sum(dW * self.applied) * self.direction) / self.sigma)"
_TABLE: tuple[tuple[str, type[Reference], str], ...] = (
    ("state never moves", StateStays, ""),
    ("state moves twice in a training pass", StateMovesTwice, "rematerialisation of a stateful layer"),
    ("training pass with the state before", OutputOfTheOldState, ""),
    (
        "raw kernel overwritten",
        KernelOverwritten,
        "keras.layers.SpectralNormalization, flax.nnx.SpectralNorm",
    ),
    ("power iteration from u", IteratesFromU, "ajbrock/BigGAN-PyTorch and the authors' code"),
    ("state not exported", StateNotExported, ""),
    (
        "norm moves in evaluation",
        MovesInEvaluation,
        "taki0112/Self-Attention-GAN-Tensorflow, rosinality/sagan-pytorch, compare_gan",
    ),
    ("norm moves with a gradient in evaluation", MovesWithGradients, ""),
    ("gradient through the power iteration", ThroughTheIteration, "u and v that are not detached"),
    ("derivatives of a training pass with the state before", StateAsBefore, ""),
    ("state not saved", SavesWithoutState, ""),
    ("every training pass begins anew", BeginsAnew, ""),
    ("norm of the first state after training passes", KeepsTheNorm, ""),
    ("state of a training pass not kept", PassNotKept, ""),
    ("state of a new layer not warmed up", StateOfNoKernel, ""),
    ("state of a kernel of zeros is zero", DeadState, "torch.nn.utils.parametrizations.spectral_norm"),
    (
        "state of a kernel of zeros stays as it was",
        StateLeftAtZero,
        "keras.layers.SpectralNormalization, but for the order",
    ),
    ("iteration in evaluation", IteratesInEvaluation, "flax.linen.SpectralNorm, ajbrock/BigGAN-PyTorch"),
)


MUTANTS: tuple[Mutant, ...] = (
    edited(
        "norm detached from the gradient",
        _FAMILY,
        (_BACK, "return np.asarray(dW / self.sigma)"),
        seen_in="keras.layers.SpectralNormalization",
    ),
    edited(
        "norm without its second derivative",
        _FAMILY,
        ("np.sum(self.along(dot) * dW) * self.direction", "0 * self.direction"),
    ),
    edited(
        "kernel of zeros over its norm",
        _FAMILY,
        ("if sigma == 0:", "if False:"),
        seen_in="torch.nn.utils.parametrizations.spectral_norm",
    ),
    edited(
        "norm of a kernel of zeros is an epsilon",
        _FAMILY,
        (
            "            return _Kernel(kernel)\n        with",
            "            sigma = sigma + spectral_norm.EPS\n        with",
        ),
    ),
    edited(
        "gradient of a kernel of zeros is zero",
        _FAMILY,
        (
            "            return _Kernel(kernel)\n        with",
            "            return _Normalised(kernel, np.outer(v, u), np.array(np.inf, kernel.dtype))\n        with",
        ),
    ),
    edited(
        "kernels without biases not normalised",
        _FAMILY,
        ("self.store(kernel / sigma)", "self.store(kernel / (sigma if self.config.use_bias else 1))"),
    ),
    edited(
        "kernels not normalised in 16 bits",
        _FAMILY,
        ("self.store(kernel / sigma)", "self.store(kernel / (sigma if self.dtype.itemsize > 2 else 1))"),
    ),
    edited("kernels not normalised", _FAMILY, ("self.store(kernel / sigma)", "self.store(kernel)")),
    *(named(name, _FAMILY, backend, seen_in=seen_in) for name, backend, seen_in in _TABLE),
)
