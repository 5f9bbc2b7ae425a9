"""The mutants: deliberately broken implementations that the kit must catch. Many have a published bug."""

from selfattn_core.conformance.mutants import (
    behaviour,
    derivative,
    function,
    precision,
    shipped,
    sixteen_bits,
    sizes,
    spectral,
    training,
)
from selfattn_core.conformance.mutants.mutant import Mutant, edited

__all__ = ["MUTANTS", "Mutant", "edited"]

MUTANTS: tuple[Mutant, ...] = (
    *function.MUTANTS,
    *derivative.MUTANTS,
    *behaviour.MUTANTS,
    *precision.MUTANTS,
    *sizes.MUTANTS,
    *sixteen_bits.MUTANTS,
    *spectral.MUTANTS,
    *training.MUTANTS,
    *shipped.MUTANTS,
)
