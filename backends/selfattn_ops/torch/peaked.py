"""Maps with weights that are too small for float32's normal numbers.

Scores have no scale, so a row of a trained layer may spread over hundreds. Weights then run down into subnormal numbers,
which a CPU adds and multiplies many times slower. No rounding of a result shows such weights, so they are raised.

Where a map is computed in blocks, |q| |k| bounds the spread of a row before there are scores. Where the bound allows weights
that small, the scores of a few rows show whether there are any. A map that is computed at once takes too little time for the
bound, so it is only looked at.

A raised weight is 2⁻⁴⁸ / M of the largest in its row, in float64 2⁻⁹⁶ / M. A row has M weights, so raising changes the
output by less than 2⁻⁴⁸ of the largest |v|, however many keys there are. Rounding to float32 changes it by 2⁻²⁴.
"""

import math

import torch

__all__ = ["raise_scores", "raised", "reach", "unit"]

# By dtype: the bits of a raised weight below the largest of its row, and the spread of scores that needs no raising.
_BITS = {torch.float32: 48, torch.float64: 96}
_HARMLESS = {torch.float32: 64.0, torch.float64: 600.0}

# By dtype: the spread of scores beyond which weights are subnormal.
_NORMAL = {torch.float32: 87.0, torch.float64: 708.0}

_SAMPLES = 8
_ROWS_OF_SAMPLE = 4
_ROWS = 8
_FEW = 2**19
"""Scores up to which a look at some rows would take more than a twentieth of the time."""


def _suffers(tensor: torch.Tensor) -> bool:
    # Only processors are slow at subnormal numbers, and on other devices the answer would have to be waited for. A tensor
    # of another type, as in FakeTensorMode, may have no numbers.
    return tensor.is_cpu and type(tensor) is torch.Tensor


def _spreads(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether the scores of a row can lie so far apart that weights are subnormal."""
    if not _suffers(query):
        return False
    # |q·k| <= |q| |k|. torch's norm takes a tenth of a small map's time where the widths are not next to each other.
    longest = [operand.square().sum(-1).amax() for operand in (query, key)]
    # Also if it is not a number.
    return not 4 * float(longest[0] * longest[1]) <= _HARMLESS[query.dtype] ** 2


def _shows(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether one of some rows, at equal distances, spreads so far.

    The bound is some times what it bounds. If only rows between those spread too far, they are few, and so is the time that
    they take.
    """
    every = max(1, query.shape[0] // _SAMPLES)
    apart = max(1, query.shape[1] // (_ROWS_OF_SAMPLE * max(1, _SAMPLES // query.shape[0])))
    scores = torch.bmm(query[::every, ::apart], key[::every].mT)
    spread = scores.amax(-1) - scores.amin(-1)
    # Also if it is not a number.
    return not float(spread.amax()) <= _HARMLESS[query.dtype]


def reach(query: torch.Tensor, key: torch.Tensor) -> float | None:
    """How far below the largest score of its row a score can count, or None if all count as they are.

    Args:
        query: (B, N, Dk) in the dtype of the scores.
        key: (B, M, Dk), alike.

    Example:
        >>> key = torch.tensor([[[-1.0], [1.0]]])
        >>> reach(torch.tensor([[[20.0]]]), key), round(reach(torch.tensor([[[200.0]]]), key))
        (None, 34)
    """
    if not (_spreads(query, key) and _shows(query, key)):
        return None
    return _reach(query.dtype, key.shape[-2])


def _reach(dtype: torch.dtype, keys: int) -> float:
    return _BITS[dtype] * math.log(2) + math.log(keys)


def raised(scores: torch.Tensor) -> torch.Tensor:
    """The scores (…, N, M), raised as by `raise_scores` if eight rows, at equal distances, show that it is worth it.

    If only rows between them spread too far, they are few, and so is the time that they take. If the eight differ from one
    another, but none spreads, raising only takes time.

    Example:
        >>> rows = torch.linspace(-200, 0, 1024).expand(1024, 1024).contiguous()
        >>> raised(rows).amin(), raised(rows / 10).amin()
        (tensor(-40.2024), tensor(-20.))
    """
    if scores.numel() <= _FEW or not _suffers(scores):
        return scores
    known, keys = scores.detach(), scores.shape[-1]
    # Between large products every operator counts, so these are few.
    step = max(1, known.numel() // keys // _ROWS) * keys
    rows = known.as_strided((min(_ROWS, known.numel() // keys), keys), (step, 1))
    if not float(rows.amax()) - float(rows.amin()) > _NORMAL[scores.dtype]:
        return scores
    return torch.maximum(scores, _lowest(known, _reach(scores.dtype, keys)))


def raise_scores(scores: torch.Tensor, reach: float) -> None:
    """Raise the scores that lie further than `reach` below the largest of their row. NaN stays."""
    torch.maximum(scores, _lowest(scores, reach), out=scores)


def _lowest(scores: torch.Tensor, reach: float) -> torch.Tensor:
    """The score (…, N, 1) to which the lower ones of each row are raised."""
    return scores.amax(-1, keepdim=True).sub_(reach)


def unit(*tensors: torch.Tensor | None) -> float:
    """A power of two that brings the largest number of the tensors to between 1/2 and 1.

    Products of a raised weight with a small gradient would be subnormal again. Derivatives are linear in the gradient.

    Example:
        >>> unit(torch.tensor([3.0, -5.0]))
        0.125
    """
    largest = max(float(tensor.abs().amax()) for tensor in tensors if tensor is not None)
    exponent = math.frexp(largest)[1] if math.isfinite(largest) else 0
    return 2.0 ** -max(-100, min(exponent, 100))
