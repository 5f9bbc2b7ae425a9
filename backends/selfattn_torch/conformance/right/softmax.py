"""Other ways to compute the softmax and its average of the values, differentiated by torch."""

import math

import torch

from selfattn_core.conformance.right.implementation import RightImplementation
from selfattn_torch.conformance.right.backend import differentiated
from selfattn_torch.conformance.right.layer import PlainLayer

__all__ = ["RIGHT"]


class Unnormalised(PlainLayer):
    """o = (e·v) / Σe."""

    def average(self, scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The quotient of the sums."""
        weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True).detach())
        return (weights @ self.wide(v) / weights.sum(dim=-1, keepdim=True)).to(v.dtype)


class UnnormalisedThroughTheMaximum(PlainLayer):
    """o = (e·v) / Σe, with derivatives that pass through the subtracted maximum too, and cancel."""

    def average(self, scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The quotient of the sums."""
        weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
        return (weights @ self.wide(v) / weights.sum(dim=-1, keepdim=True)).to(v.dtype)


class LogSumExp(PlainLayer):
    """A = exp(s − log Σ exp s)."""

    def probabilities(self, scores: torch.Tensor) -> torch.Tensor:
        """The exponential of a difference."""
        return torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True))


class LogSoftmax(PlainLayer):
    """A = exp(log softmax)."""

    def probabilities(self, scores: torch.Tensor) -> torch.Tensor:
        """The exponential of the framework's logarithm."""
        return torch.log_softmax(scores, dim=-1).exp()


class Reciprocal(PlainLayer):
    """A = e · (1 / Σe)."""

    def probabilities(self, scores: torch.Tensor) -> torch.Tensor:
        """The product with a reciprocal."""
        weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True).detach())
        return weights * weights.sum(dim=-1, keepdim=True).reciprocal()


class PowersOfTwo(PlainLayer):
    """A = 2^(s log₂e) / Σ."""

    def probabilities(self, scores: torch.Tensor) -> torch.Tensor:
        """Exponentials with base two of scaled scores."""
        scaled = scores * math.log2(math.e)
        weights = torch.exp2(scaled - scaled.amax(dim=-1, keepdim=True).detach())
        return weights / weights.sum(dim=-1, keepdim=True)


class ScaledQueries(PlainLayer):
    """A = 2^(q log₂e kᵀ) / Σ, as fused kernels scale the query once."""

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Scores in units of log 2."""
        return super().scores(self.wide(q) * math.log2(math.e), k)

    def probabilities(self, scores: torch.Tensor) -> torch.Tensor:
        """Exponentials with base two."""
        weights = torch.exp2(scores - scores.amax(dim=-1, keepdim=True).detach())
        return weights / weights.sum(dim=-1, keepdim=True)


class Online(PlainLayer):
    """The softmax over one block of keys after another, which rescales what it has."""

    keys = 4

    def average(self, scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Numerator and denominator, relative to the largest score so far."""
        wide = self.wide(v)
        largest = scores.new_full((*scores.shape[:-1], 1), -math.inf)
        total, attended = torch.zeros_like(largest), scores.new_zeros(*scores.shape[:-1], v.shape[-1])
        blocks = zip(scores.split(self.keys, dim=-1), wide.split(self.keys, dim=-2), strict=True)
        for block, values in blocks:
            larger = torch.maximum(largest, block.amax(dim=-1, keepdim=True).detach())
            shrink, weights = torch.exp(largest - larger), torch.exp(block - larger)
            total = total * shrink + weights.sum(dim=-1, keepdim=True)
            attended = attended * shrink + weights @ values
            largest = larger
        return (attended / total).to(v.dtype)


class OnlineByOne(Online):
    """The same, with one key in a block."""

    keys = 1


class OnlineByEleven(Online):
    """The same, with a ragged last block."""

    keys = 11


class AcrossTheColumns(PlainLayer):
    """The softmax over the first axis of k qᵀ."""

    def average(self, scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Products of transposes."""
        return (self.wide(v).mT @ torch.softmax(scores.mT, dim=-2)).mT.to(v.dtype)


class RowByRow(PlainLayer):
    """Blocks of three query rows."""

    def average(self, scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The rows of each block."""
        return torch.cat([super(RowByRow, self).average(rows, v) for rows in scores.split(3, dim=-2)], dim=-2)


RIGHT: tuple[RightImplementation, ...] = (
    differentiated("plain operations", "They are the definition's own.", PlainLayer),
    differentiated("unnormalised", "A v = (e v) / Σe, because each row has one divisor.", Unnormalised),
    differentiated(
        "unnormalised, through the maximum",
        "The softmax does not depend on what is subtracted, so these derivatives cancel.",
        UnnormalisedThroughTheMaximum,
    ),
    differentiated("log-sum-exp", "exp(s) / Σ exp s = exp(s − log Σ exp s).", LogSumExp),
    differentiated("log-softmax", "The softmax is the exponential of its logarithm.", LogSoftmax),
    differentiated("reciprocal", "A quotient is a product with the reciprocal.", Reciprocal),
    differentiated("powers of two", "exp s = 2^(s log₂e).", PowersOfTwo),
    differentiated("scaled queries", "The factor log₂e may be in q.", ScaledQueries),
    differentiated("online, blocks of four keys", "Both sums change by the same factor.", Online),
    differentiated("online, one key at a time", "A block may have any number of keys.", OnlineByOne),
    differentiated("online, blocks of eleven keys", "The last block may be smaller.", OnlineByEleven),
    differentiated("softmax across columns", "(A v)ᵀ = vᵀ Aᵀ.", AcrossTheColumns),
    differentiated("blocks of three query rows", "Rows do not depend on each other.", RowByRow),
)
