"""The families of cases: one row per family, read wherever families differ.

The levels build on one another:

| level | a backend that reaches it | families that it adds |
|---|---|---|
| core | computes the function in every situation | forward, map, sizes, batch, permutation, determinism, nonfinite |
| training | can be trained, and loads and returns weights | vjp, params, init, trajectory |
| gan | can be trained under a gradient penalty | r1, mixed |
| deploy | can serve: in 16 bits, compiled, saved, at large sizes, in linear memory | dtype, compiled, saved, large, memory |

The families spectral_norm, per_sample and shipped are optional. A backend that claims one is tested on it, but no level
needs it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from selfattn_core.conformance.cases.computations import Ability, ComputationName

__all__ = ["FAMILIES", "LEVELS", "Family", "FamilyName", "Level", "through"]

Level = Literal["core", "training", "gan", "deploy"]
FamilyName = Literal[
    "forward",
    "map",
    "sizes",
    "batch",
    "permutation",
    "determinism",
    "nonfinite",
    "vjp",
    "params",
    "init",
    "trajectory",
    "spectral_norm",
    "r1",
    "mixed",
    "dtype",
    "compiled",
    "saved",
    "per_sample",
    "large",
    "memory",
    "shipped",
]


@dataclass(frozen=True)
class Family:
    """One row of the table. `questions.ask` holds the question of each family.

    Args:
        level: the level that adds it.
        title: its name in reports.
        computes: what its cases compute, except cases with an `of`.
        needs: the abilities that a backend must claim, in addition to those that the computation needs.
        optional: whether a backend can reach the level without it.
        every_layout: whether its float32 cases run in every layout.
        default_precision: whether its cases run float32 in the framework's default precision, in their own process. All
            other families run in full precision.
        golden: whether golden vectors contain its values.
        calibrated: whether `release.calibrate` measures its values.
    """

    level: Level
    title: str
    computes: ComputationName = "forward"
    needs: tuple[Ability, ...] = ()
    optional: bool = False
    every_layout: bool = True
    default_precision: bool = False
    golden: bool = False
    calibrated: bool = False


FAMILIES: Mapping[FamilyName, Family] = {
    "forward": Family("core", "forward", golden=True, calibrated=True),
    "map": Family("core", "attention map", "map", golden=True, calibrated=True),
    "sizes": Family("core", "two sizes", calibrated=True),
    "batch": Family("core", "batch independence", calibrated=True),
    "permutation": Family("core", "permuted positions", calibrated=True),
    "determinism": Family("core", "determinism", calibrated=True),
    "nonfinite": Family("core", "NaN and infinity", calibrated=True),
    "vjp": Family("training", "gradients", "vjp", golden=True, calibrated=True),
    "params": Family("training", "parameters", "params", every_layout=False),
    "init": Family("training", "initialisation", "init", every_layout=False),
    "trajectory": Family(
        "training", "training, 200 steps", "trajectory", every_layout=False, calibrated=True
    ),
    "spectral_norm": Family(
        "training",
        "spectral norm",
        needs=("spectral_norm", "forward"),
        optional=True,
        golden=True,
        calibrated=True,
    ),
    "r1": Family("gan", "R1 penalty", "r1", ("r1",), golden=True, calibrated=True),
    "mixed": Family("gan", "mixed second order", "mixed", golden=True, calibrated=True),
    "dtype": Family("deploy", "16 bits", calibrated=True),
    "compiled": Family("deploy", "compiled", needs=("compiled",)),
    "saved": Family("deploy", "saved and loaded", "saved", every_layout=False),
    "per_sample": Family("deploy", "per-sample gradients", "per_sample", optional=True, every_layout=False),
    "large": Family("deploy", "large sizes", every_layout=False),
    "memory": Family("deploy", "linear memory", needs=("memory",), every_layout=False),
    "shipped": Family(
        "deploy",
        "default precision",
        needs=("shipped",),
        optional=True,
        every_layout=False,
        default_precision=True,
    ),
}

LEVELS: Mapping[Level, tuple[FamilyName, ...]] = {
    level: tuple(name for name, family in FAMILIES.items() if family.level == level)
    for level in get_args(Level)
}
"""The families that each level adds to the one before."""


def through(level: Level) -> tuple[FamilyName, ...]:
    """The families of a level and of those below it.

    Example:
        >>> through("training")[-5:]
        ('vjp', 'params', 'init', 'trajectory', 'spectral_norm')
    """
    reached = list(LEVELS)[: list(LEVELS).index(level) + 1]
    return tuple(family for each in reached for family in LEVELS[each])
