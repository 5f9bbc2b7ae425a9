"""What a case computes: one row per computation, read wherever the kind of computation matters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["COMPUTATIONS", "Ability", "Computation", "ComputationName"]

Ability = Literal[
    "forward",
    "map",
    "vjp",
    "params",
    "init",
    "spectral_norm",
    "training_vjp",
    "r1",
    "mixed",
    "compiled",
    "saved",
    "per_sample",
    "memory",
    "shipped",
]
ComputationName = Literal[
    "forward",
    "map",
    "spectral_norm",
    "vjp",
    "training_vjp",
    "per_sample",
    "evaluation",
    "r1",
    "mixed",
    "trajectory",
    "params",
    "init",
    "saved",
]


@dataclass(frozen=True)
class Computation:
    """One row of the table.

    Args:
        needs: the abilities that a backend must claim.
        order: the order of the derivatives. 0 for the function itself.
        values: whether every answer is a value of the function or of a derivative. The other computations ask for values
            that a framework stores.
    """

    needs: tuple[Ability, ...]
    order: int = 0
    values: bool = True


COMPUTATIONS: Mapping[ComputationName, Computation] = {
    "forward": Computation(("forward",)),
    "map": Computation(("map",)),
    "spectral_norm": Computation(("spectral_norm",)),
    "vjp": Computation(("vjp",), order=1),
    "training_vjp": Computation(("training_vjp",), order=1),
    "per_sample": Computation(("per_sample",), order=1),
    "evaluation": Computation(("forward", "vjp", "params"), order=1),
    "r1": Computation(("r1",), order=2),
    "mixed": Computation(("mixed",), order=2),
    "trajectory": Computation(("forward", "vjp")),
    "params": Computation(("params",), values=False),
    "init": Computation(("init",), values=False),
    "saved": Computation(("saved", "forward", "params"), values=False),
}
"""The computations by name.

"spectral_norm" is a forward pass in training mode, and "training_vjp" is its derivatives. "evaluation" checks that calls in
evaluation mode do not change the layer, their arguments or earlier answers.
"""
