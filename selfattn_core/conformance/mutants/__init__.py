"""Broken implementations that the kit has to catch: published bugs, bugs one edit away, and bugs of derivatives."""

from selfattn_core.conformance.mutants import (
    behaviour,
    derivative,
    function,
    shipped,
    sixteen_bits,
    spectral,
    training,
)
from selfattn_core.conformance.mutants.mutant import Mutant, edited

__all__ = ["MUTANTS", "Mutant", "edited"]

MUTANTS: tuple[Mutant, ...] = (
    *function.MUTANTS,
    *derivative.MUTANTS,
    *behaviour.MUTANTS,
    *sixteen_bits.MUTANTS,
    *spectral.MUTANTS,
    *training.MUTANTS,
    *shipped.MUTANTS,
)
