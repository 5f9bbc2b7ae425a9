"""A case, and a run: one case in one dtype and layout."""

from dataclasses import dataclass
from typing import Literal, get_args

from selfattn_core.config import SelfAttentionConfig
from selfattn_core.conformance.cases.computations import COMPUTATIONS, Ability, ComputationName
from selfattn_core.conformance.cases.families import FAMILIES, FamilyName, Level, through

__all__ = ["DTYPES", "LAYOUTS", "SIXTEEN_BITS", "Case", "Layout", "Run"]

Layout = Literal["channels_last", "channels_first"]

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
SIXTEEN_BITS = ("bfloat16", "float16")
DTYPES = ("float32", "float64", *SIXTEEN_BITS)


@dataclass(frozen=True)
class Case:
    """One layer, one input and one question.

    Args:
        id: the permanent id. A case whose question or input changes gets a new one. Its dtypes, layouts and level may change.
        family: the family of the question.
        title: what the case tests.
        config: the layer.
        shape: (B, H, W) of the input.
        gamma: the learned gain.
        logits: the standard deviation of the entries of q kᵀ.
        constant: whether all positions of the input are equal.
        of: what the case computes. "forward" means what its family computes.
        dtypes: the dtypes of its runs.
        second_shape: (B, H, W) of the other input of a "sizes" case.
        integers: whether x and the weights are small multiples of a power of two. Then projections are exact, in 16 bits
            too, and pooling windows contain equal values.
        poison: (b, h, w, c) of the entry of x that is not finite, and its value.
        optimizer: the optimiser of a "trajectory" case.
        eager: whether a "compiled" case runs the layer uncompiled, operation by operation.
        one_sign: whether no entry of x, dy and the weights of value and out projection is negative. Then sums over
            positions grow with their number.
        zero: the projections whose kernel is zero.
        view: the memory of x and dy. "strided" is every other column and channel of larger arrays, and "transposed" is
            channels-first memory. By default they are contiguous.
        one_layout: whether float32 runs in one layout only, of a family that runs in every layout.
        late: whether only the level deploy asks it, and not that of its family.
        passes: the number of training passes before the question, for a layer with spectral norm.
        copies: how often each position occurs in x, dy and the cotangent of x (`cases.copies`).
    """

    id: str
    family: FamilyName
    title: str
    config: SelfAttentionConfig
    shape: tuple[int, int, int] = (2, 5, 7)
    gamma: float = 0.7
    logits: float = 3.0
    constant: bool = False
    of: ComputationName = "forward"
    dtypes: tuple[str, ...] = ("float32", "float64")
    second_shape: tuple[int, int, int] | None = None
    integers: bool = False
    poison: tuple[tuple[int, int, int, int], float] | None = None
    optimizer: Literal["", "momentum", "adam"] = ""
    eager: bool = False
    one_sign: bool = False
    zero: tuple[str, ...] = ()
    view: Literal["", "strided", "transposed"] = ""
    one_layout: bool = False
    late: bool = False
    passes: int = 0
    copies: int = 1

    @property
    def computation(self) -> ComputationName:
        """What is computed, as a key of `COMPUTATIONS`.

        Example:
            >>> Case("mine", "vjp", "", SelfAttentionConfig(8)).computation
            'vjp'
        """
        return FAMILIES[self.family].computes if self.of == "forward" else self.of

    @property
    def needs(self) -> frozenset[Ability]:
        """The abilities that a backend must claim for the kit to run this case.

        Example:
            >>> sorted(Case("mine", "saved", "", SelfAttentionConfig(8)).needs)
            ['forward', 'params', 'saved']
        """
        passes: tuple[Ability, ...] = ("spectral_norm",) if self.passes else ()
        return frozenset(FAMILIES[self.family].needs + COMPUTATIONS[self.computation].needs + passes)

    def asked_at(self, level: Level) -> bool:
        """Whether the kit asks the case at a level.

        Args:
            level: the level.

        Example:
            >>> case = Case("mine", "vjp", "", SelfAttentionConfig(8), late=True)
            >>> [case.asked_at(level) for level in ("core", "training", "gan", "deploy")]
            [False, False, False, True]
        """
        return self.family in through(level) and (level == "deploy" or not self.late)

    @property
    def order(self) -> int:
        """The order of the computed derivatives. 0 for the function itself."""
        return COMPUTATIONS[self.computation].order

    @property
    def tied(self) -> bool:
        """Whether derivatives depend on which of several equal values of a pooling window wins.

        Example:
            >>> Case("mine", "vjp", "", SelfAttentionConfig(8, kv_pool=2), integers=True).tied
            True
        """
        return self.integers and self.config.kv_pool > 1 and self.order > 0

    @property
    def narrow(self) -> bool:
        """Whether the case runs only in 16 bits."""
        return set(self.dtypes) <= set(SIXTEEN_BITS)


@dataclass(frozen=True)
class Run:
    """One case in one dtype and layout."""

    case: Case
    dtype: str
    layout: str

    @property
    def id(self) -> str:
        """The id of the run, such as "SA-FWD-001/float32/channels_last"."""
        return f"{self.case.id}/{self.dtype}/{self.layout}"

    @property
    def in_any_layout(self) -> bool:
        """Whether a backend may answer in any of its layouts, because a second one would test nothing new."""
        one = self.case.one_layout or not FAMILIES[self.case.family].every_layout
        return self.dtype != "float32" or one

    def is_named(self, key: str) -> bool:
        """Whether a key of `Backend.expected_failures` includes this run.

        Example:
            >>> run = Run(Case("SA-FWD-001", "forward", "", SelfAttentionConfig(8)), "float32", "channels_last")
            >>> run.id, run.is_named("SA-FWD-001/float32"), run.is_named("SA-FWD-001/float64")
            ('SA-FWD-001/float32/channels_last', True, False)
        """
        return f"{self.id}/".startswith(f"{key}/")
