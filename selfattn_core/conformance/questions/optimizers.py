"""The optimisers of the training cases, in numpy, so that every backend takes the same steps."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from selfattn_core.arrays import Array

__all__ = ["OPTIMIZERS", "Adam", "Momentum", "Optimizer"]

Params = Mapping[str, Array]


class Optimizer(Protocol):
    """Computes the next weights from weights and gradients."""

    def step(self, params: Params, gradients: Params) -> dict[str, Array]:
        """The next weights, in the dtype of the weights."""


class Momentum:
    """Gradient descent with heavy-ball momentum: v = 0.9 v + g, w = w − rate·v."""

    def __init__(self, rate: float = 0.01, decay: float = 0.9) -> None:
        self.rate, self.decay = rate, decay
        self._velocity: dict[str, Array] = {}

    def step(self, params: Params, gradients: Params) -> dict[str, Array]:
        """One step.

        Args:
            params: the weights.
            gradients: an array for each of them.
        """
        for name, value in params.items():
            self._velocity[name] = (
                self.decay * self._velocity.get(name, np.zeros_like(value)) + gradients[name]
            )
        return {name: value - self.rate * self._velocity[name] for name, value in params.items()}


class Adam:
    """Adam.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015, algorithm 1.
    """

    def __init__(
        self, rate: float = 0.003, decay: float = 0.9, square_decay: float = 0.999, epsilon: float = 1e-8
    ) -> None:
        self.rate, self.decay, self.square_decay, self.epsilon = rate, decay, square_decay, epsilon
        self._mean: dict[str, Array] = {}
        self._square: dict[str, Array] = {}
        self._steps = 0

    def step(self, params: Params, gradients: Params) -> dict[str, Array]:
        """One step.

        Args:
            params: the weights.
            gradients: an array for each of them.
        """
        self._steps += 1
        following = {}
        for name, value in params.items():
            zeros = np.zeros_like(value)
            gradient = gradients[name]
            self._mean[name] = self.decay * self._mean.get(name, zeros) + (1 - self.decay) * gradient
            self._square[name] = (
                self.square_decay * self._square.get(name, zeros) + (1 - self.square_decay) * gradient**2
            )
            mean = self._mean[name] / (1 - self.decay**self._steps)
            square = self._square[name] / (1 - self.square_decay**self._steps)
            following[name] = value - self.rate * mean / (np.sqrt(square) + self.epsilon)
        return following


OPTIMIZERS: Mapping[str, type[Momentum] | type[Adam]] = {"momentum": Momentum, "adam": Adam}
