"""The layer in plain operations of torch, which torch differentiates once and twice. Right implementations change a step."""

from collections.abc import Mapping

import torch
from torch.nn import functional

from selfattn_core import SelfAttentionConfig
from selfattn_core.conformance.cases.case import DTYPES
from selfattn_core.params import projections

__all__ = ["PlainLayer"]


class PlainLayer:
    """The layer, with one method for each step. Maps are flattened to (B, N, ·).

    Products of q and k, the softmax and its product with v are in float32 for 16-bit arguments.

    Args:
        config: the configuration.
        weights: the parameters and the state, as for `spec.forward`.
    """

    dtypes: tuple[str, ...] = DTYPES

    def __init__(self, config: SelfAttentionConfig, weights: Mapping[str, torch.Tensor]) -> None:
        self.config = config
        self.weights = weights
        self.kernels = {name: self.kernel(name) for name in projections(config)}

    @staticmethod
    def declines(config: SelfAttentionConfig) -> str:  # noqa: ARG004 - a subclass may decline some
        """Why there is no layer for a configuration. Empty if there is one."""
        return ""

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """The output y, (B, H, W, C)."""
        z = self.attended(x)
        return self.gain(z).reshape(x.shape) + x

    def attention_map(self, x: torch.Tensor) -> torch.Tensor:
        """The map A, (B, N, M)."""
        return self.probabilities(self.scores(self.query(x), self.key(x))).to(x.dtype)

    def attended(self, x: torch.Tensor) -> torch.Tensor:
        """The projected average z, (B, N, C)."""
        return self.out(self.average(self.scores(self.query(x), self.key(x)), self.value(x)))

    def query(self, x: torch.Tensor) -> torch.Tensor:
        """The query q, (B, N, Dk)."""
        return self.projected("query", x).flatten(1, 2)

    def key(self, x: torch.Tensor) -> torch.Tensor:
        """The key k, (B, M, Dk)."""
        return self.pooled(self.projected("key", x)).flatten(1, 2)

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """The value v, (B, M, Dv)."""
        return self.pooled(self.projected("value", x)).flatten(1, 2)

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Scores q kᵀ, in the dtype of the arithmetic."""
        return self.wide(q) @ self.wide(k).mT

    def probabilities(self, scores: torch.Tensor) -> torch.Tensor:
        """A, in the dtype of the arithmetic."""
        return torch.softmax(scores, dim=-1)

    def average(self, scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The average o, in the dtype of v."""
        return (self.probabilities(scores) @ self.wide(v)).to(v.dtype)

    def out(self, o: torch.Tensor) -> torch.Tensor:
        """The projected average z."""
        return self.projected("out", o) if self.config.out_projection else o

    def gain(self, z: torch.Tensor) -> torch.Tensor:
        """The product γ z."""
        return self.weights["gamma"] * z

    def projected(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """A product over the last axis, and the bias."""
        projected = rows @ self.kernels[name]
        return projected + self.weights[f"{name}.bias"] if self.config.use_bias else projected

    def kernel(self, name: str) -> torch.Tensor:
        """W, which spectral norm divides."""
        kernel = self.weights[f"{name}.kernel"]
        if not self.config.spectral_norm:
            return kernel
        wide = self.wide(kernel)
        sigma = self.wide(self.weights[f"{name}.v"]) @ wide @ self.wide(self.weights[f"{name}.u"])
        return kernel if sigma == 0 else (wide / sigma).to(kernel.dtype)

    def pooled(self, maps: torch.Tensor) -> torch.Tensor:
        """The largest value of each whole window, (B, H, W, D) to (B, H', W', D)."""
        side = self.config.kv_pool
        if side == 1:
            return maps
        batch, height, width, channels = maps.shape
        if batch == 0:
            return maps.new_zeros(0, height // side, width // side, channels) + 0 * maps.sum()
        return functional.max_pool2d(maps.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)

    def wide(self, values: torch.Tensor) -> torch.Tensor:
        """The values in the dtype of the arithmetic."""
        return values.float() if values.itemsize == 2 else values
