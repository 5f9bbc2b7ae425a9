"""The shape of each quantity of an answer, so that a wrong one is refused before anything stores it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from selfattn_core.conformance.cases.case import Case
from selfattn_core.conformance.questions.ask import INITIAL_DRAWS
from selfattn_core.conformance.questions.training import STEPS, trained
from selfattn_core.params import parameter_table, state_table

__all__ = ["answer_shapes", "misshapen"]

Shape = tuple[int, ...]


def misshapen(case: Case, found: Mapping[str, Any]) -> str:
    """The quantities of an answer that have another shape than the case asks for. Empty if there are none.

    A stretched view may have terabytes, and writing it would fill the disk.

    Args:
        case: the case.
        found: the answer, arrays by quantity. Names that the case does not have are left out.

    Example:
        >>> from selfattn_core import SelfAttentionConfig
        >>> case = Case("mine", "forward", "", SelfAttentionConfig(8))
        >>> misshapen(case, {"y": np.broadcast_to(np.ones(8), (10**6, 5, 7, 8))})
        'y: got shape (1000000, 5, 7, 8), expected (2, 5, 7, 8)'
    """
    expected = answer_shapes(case)
    return "; ".join(
        f"{name}: got shape {np.shape(value)}, expected {expected[name]}"
        for name, value in found.items()
        if name in expected and np.shape(value) != expected[name]
    )


def answer_shapes(case: Case) -> dict[str, Shape]:
    """The shape of each quantity that a case asks for.

    Args:
        case: the case.

    Example:
        >>> from selfattn_core import SelfAttentionConfig
        >>> answer_shapes(Case("mine", "map", "", SelfAttentionConfig(8)))
        {'map': (2, 35, 35)}
    """
    maps = (*case.shape, case.config.channels)
    parameters = {name: row.shape for name, row in parameter_table(case.config).items()}
    weights = parameters | {name: row.shape for name, row in state_table(case.config).items()}
    first = {"x": maps, **parameters}
    if case.family == "determinism":
        return dict.fromkeys(("y", "again", "rebuilt"), maps)
    if case.family == "batch":
        return {"y of the rest": (maps[0] - 1, *maps[1:]), "y of one alone": (1, *maps[1:])}
    if case.family == "sizes":
        other = (*(case.second_shape or case.shape), case.config.channels)
        return {"y": maps, "y of the other size": other, "y of another map": maps, "y again": maps}
    by_computation: Mapping[str, Mapping[str, Shape]] = {
        "forward": {"y": maps},
        "map": {"map": _map(case)},
        "spectral_norm": {"y": maps, **weights},
        "vjp": first,
        "training_vjp": first,
        "per_sample": {"x": maps, **{name: (maps[0], *shape) for name, shape in parameters.items()}},
        "evaluation": {
            **dict.fromkeys(("y", "y again", "argument x", "argument dy"), maps),
            **first,
            **{f"{name} again": shape for name, shape in first.items()},
            **{f"weight {name}": shape for name, shape in weights.items()},
        },
        "r1": {"r1": (), **first},
        "mixed": {"dy": maps, **first},
        "trajectory": {"loss": (STEPS,), **parameters},
        "params": weights,
        "saved": {"y": maps, **weights},
        "init": {
            f"{draw}: {name}": shape for draw in range(INITIAL_DRAWS) for name, shape in weights.items()
        },
    }
    found = dict(by_computation[case.computation])
    if case.family == "memory":
        return {"bytes": (), **found}
    if case.computation == "trajectory":
        return {name: found[name] for name in trained(case)}
    return found


def _map(case: Case) -> Shape:
    batch, height, width = case.shape
    down, across = case.config.key_grid(height, width)
    return (batch, height * width, down * across)
