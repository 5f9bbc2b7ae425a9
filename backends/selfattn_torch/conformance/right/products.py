"""Products in other orders and with other factors folded in, differentiated by torch."""

from collections.abc import Mapping

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from selfattn_core import SelfAttentionConfig
from selfattn_core.conformance.right.implementation import RightImplementation
from selfattn_torch.conformance.right.backend import differentiated
from selfattn_torch.conformance.right.layer import PlainLayer

__all__ = ["RIGHT"]


class FoldedScores(PlainLayer):
    """Scores from Wq Wkᵀ, without the key bias."""

    @staticmethod
    def declines(config: SelfAttentionConfig) -> str:
        """Pooling is between the two kernels."""
        return "pooled keys cannot be folded" if config.kv_pool > 1 else ""

    def attention_map(self, x: torch.Tensor) -> torch.Tensor:
        """A."""
        return self.probabilities(self.folded(x)).to(x.dtype)

    def attended(self, x: torch.Tensor) -> torch.Tensor:
        """The projected average z."""
        return self.out(self.average(self.folded(x), self.value(x)))

    def folded(self, x: torch.Tensor) -> torch.Tensor:
        """(x Wq Wkᵀ + bq Wkᵀ) xᵀ. The key bias would add a constant to each row."""
        rows = self.wide(x).flatten(1, 2)
        key = self.wide(self.kernels["key"]).mT
        asked = rows @ (self.wide(self.kernels["query"]) @ key)
        if self.config.use_bias:
            asked = asked + self.wide(self.weights["query.bias"]) @ key
        return asked @ rows.mT


class NoKeyBias(PlainLayer):
    """Scores without the key bias."""

    def key(self, x: torch.Tensor) -> torch.Tensor:
        """The key without its bias."""
        return self.pooled(x @ self.kernels["key"]).flatten(1, 2)


class CentredKeys(PlainLayer):
    """Scores from keys minus their mean."""

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Scores q (k − mean k)ᵀ."""
        wide = self.wide(k)
        return self.wide(q) @ (wide - wide.mean(dim=-2, keepdim=True)).mT


class OutBeforeAverage(PlainLayer):
    """A (v Wo) in place of (A v) Wo."""

    def attended(self, x: torch.Tensor) -> torch.Tensor:
        """The projected average z."""
        v = self.value(x)
        if not self.config.out_projection:
            return self.average(self.scores(self.query(x), self.key(x)), v)
        # A 16-bit layer that stores v Wo would round it once more.
        wide = self.wide(v) @ self.wide(self.kernels["out"])
        z = self.average(self.scores(self.query(x), self.key(x)), wide)
        return (z + self.weights["out.bias"] if self.config.use_bias else z).to(x.dtype)


class ValueBiasAfterAverage(PlainLayer):
    """A v + bv in place of A (v + bv)."""

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """The value without its bias."""
        return self.pooled(x @ self.kernels["value"]).flatten(1, 2)

    def average(self, scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The average o."""
        o = super().average(scores, self.wide(v))
        return (o + self.weights["value.bias"] if self.config.use_bias else o).to(v.dtype)


class GammaInTheKernel(PlainLayer):
    """o (γ Wo) + γ bo in place of γ (o Wo + bo)."""

    @staticmethod
    def declines(config: SelfAttentionConfig) -> str:
        """There must be a kernel."""
        return "" if config.out_projection else "there is no out projection"

    def out(self, o: torch.Tensor) -> torch.Tensor:
        """The product γ z."""
        gamma = self.wide(self.weights["gamma"])
        z = self.wide(o) @ (gamma * self.kernels["out"])
        return (z + gamma * self.weights["out.bias"] if self.config.use_bias else z).to(o.dtype)

    def gain(self, z: torch.Tensor) -> torch.Tensor:
        """Nothing more."""
        return z


class GammaInTheValues(PlainLayer):
    """A (γ v) in place of γ (A v)."""

    @staticmethod
    def declines(config: SelfAttentionConfig) -> str:
        """An out projection has a bias."""
        return "the out projection is in between" if config.out_projection else ""

    def average(self, scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The average of γ v."""
        return super().average(scores, self.wide(v) * self.wide(self.weights["gamma"])).to(v.dtype)

    def gain(self, z: torch.Tensor) -> torch.Tensor:
        """Nothing more."""
        return z


class Convolutions(PlainLayer):
    """1×1 convolutions of channels-first maps."""

    def projected(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """The convolution."""
        maps = rows[:, :, None] if rows.ndim == 3 else rows
        kernel = self.kernels[name].mT[:, :, None, None]
        bias = self.weights[f"{name}.bias"] if self.config.use_bias else None
        found = functional.conv2d(maps.permute(0, 3, 1, 2), kernel, bias).permute(0, 2, 3, 1)
        return found[:, :, 0] if rows.ndim == 3 else found


class BiasAsChannel(PlainLayer):
    """Biases as a row of the kernel, for a channel of ones."""

    def projected(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """One product."""
        if not self.config.use_bias:
            return super().projected(name, rows)
        ones = torch.ones_like(rows[..., :1])
        kernel = torch.cat([self.kernels[name], self.weights[f"{name}.bias"][None]])
        return torch.cat([rows, ones], dim=-1) @ kernel


class SampleBySample(PlainLayer):
    """One sample after another."""

    # torch would add the gradients of the samples up in 16 bits, which is a bug.
    dtypes = ("float32", "float64")

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """The output y."""
        samples = x.split(1) if len(x) else (x,)
        return torch.cat([super(SampleBySample, self).output(sample) for sample in samples])


class InPieces(PlainLayer):
    """Products as sums of products over pieces of the axis that is summed."""

    def average(self, scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The average o."""
        pieces = zip(self.probabilities(scores).split(5, dim=-1), self.wide(v).split(5, dim=-2), strict=True)
        return torch.stack([left @ right for left, right in pieces]).sum(dim=0).to(v.dtype)


class Multiplied(PlainLayer):
    """Elementwise products that are summed, without any matrix product."""

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Scores q kᵀ."""
        return (self.wide(q)[..., :, None, :] * self.wide(k)[..., None, :, :]).sum(dim=-1)

    def average(self, scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The average o."""
        return (self.probabilities(scores)[..., None] * self.wide(v)[..., None, :, :]).sum(dim=-2).to(v.dtype)


class OfTheFramework(PlainLayer):
    """torch's own attention, with scale 1."""

    def attended(self, x: torch.Tensor) -> torch.Tensor:
        """The projected average z."""
        q, k, v = (self.wide(rows)[:, None] for rows in (self.query(x), self.key(x), self.value(x)))
        with sdpa_kernel(SDPBackend.MATH):
            o = functional.scaled_dot_product_attention(q, k, v, scale=1.0)
        return self.out(o[:, 0].to(x.dtype))


class InDouble(PlainLayer):
    """Everything in float64, rounded once."""

    def __init__(self, config: SelfAttentionConfig, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config, {name: tensor.double() for name, tensor in weights.items()})

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """The output y."""
        return super().output(x.double()).to(x.dtype)

    def attention_map(self, x: torch.Tensor) -> torch.Tensor:
        """A."""
        return super().attention_map(x.double()).to(x.dtype)


RIGHT: tuple[RightImplementation, ...] = (
    differentiated(
        "folded scores",
        "(x Wq + bq) (x Wk + bk)ᵀ is this plus a constant for each row, which the softmax ignores.",
        FoldedScores,
    ),
    differentiated("no key bias", "It adds a constant to each row of scores.", NoKeyBias),
    differentiated("centred keys", "The mean key adds a constant to each row of scores.", CentredKeys),
    differentiated("out projection before the average", "(A v) Wo = A (v Wo).", OutBeforeAverage),
    differentiated("value bias after the average", "The rows of A sum to 1.", ValueBiasAfterAverage),
    differentiated("gamma in the out kernel", "γ (o Wo + bo) = o (γ Wo) + γ bo.", GammaInTheKernel),
    differentiated("gamma in the values", "γ (A v) = A (γ v).", GammaInTheValues),
    differentiated("1×1 convolutions", "They are products over channels.", Convolutions),
    differentiated("bias as a channel", "x W + b = (x, 1) (W; b).", BiasAsChannel),
    differentiated("sample by sample", "Samples do not depend on each other.", SampleBySample),
    differentiated("products in pieces", "A sum may be a sum of sums.", InPieces),
    differentiated(
        "products without a matrix product", "A product of matrices is a sum of products.", Multiplied
    ),
    differentiated("attention of the framework", "It has a scale, which is 1 here.", OfTheFramework),
    differentiated("everything in float64", "More digits are no error.", InDouble),
)
