"""The dtypes of the computation: of scores and sums, and of the factors of products with the map."""

import torch

__all__ = ["arithmetic_of", "factor_of", "multiplies_bfloat16"]


def arithmetic_of(operand: torch.Tensor) -> torch.dtype:
    """The dtype of scores, softmax and sums, which is at least float32."""
    # `promote_types` would become part of the graph of torch.export.
    return torch.float32 if operand.dtype.itemsize < 4 else operand.dtype


def factor_of(operand: torch.Tensor) -> torch.dtype:
    """The dtype of the factors of products with A, dA and dS in derivatives. It depends on dtype and device alone.

    It is bfloat16 where the operands are, and the processor multiplies matrices of bfloat16 (AMX). Such a product sums in
    float32. Without AMX, products of bfloat16 take at least as long as those of float32, also with AVX512_BF16.
    """
    if operand.dtype == torch.bfloat16 and operand.device.type == "cpu" and multiplies_bfloat16():
        return torch.bfloat16
    return arithmetic_of(operand)


def multiplies_bfloat16() -> bool:
    """Whether torch multiplies bfloat16 faster than float32 on this processor, which then has tiles."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
