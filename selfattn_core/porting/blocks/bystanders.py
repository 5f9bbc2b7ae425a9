"""Recognises tensors that are not the weights of a layer: an optimiser's state and averaged copies.

Sources: torch/optim for the names of its slots; optax/_src/transform.py; tensorflow/python/training/slot_creator.py and
moving_averages.py; keras/src/optimizers; flax/optim of Flax before 0.6; paddle/optimizer.
"""

import itertools
import re
from collections.abc import Iterable

from selfattn_core.porting.blocks.keys import normal

__all__ = ["averages_without_names", "is_averaged", "optimiser_keys"]

_CONTAINERS = {
    "opt_state",
    "opt_states",
    "optimizer_state",
    "optimizer_states",
    "optimizer_state_dict",
    "optimizer_weights",
    "param_states",
    "OPTIMIZER_SLOT",
}
_NAME = re.compile(r"(.*[_-])?(optimi[sz]er|optim|opt)s?([_-].*)?", re.IGNORECASE)
_INSIDE = {
    *("state", "param_groups", "vars", "iter", "learning_rate", "decay", "beta_1", "beta_2", "count"),
    *("_variables", "_trainable_variables", "_momentums", "_velocities", "_iterations", "_learning_rate"),
    *("mu", "nu", "trace", "opt_state", "inner_state"),
}
_TORCH = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg"),
    *("acc_delta", "grad_avg"),
}
_TWINS = {"mu": "nu", "nu": "mu"}
_SLOTS = {
    f"{name}{number}"
    for name in ("Adam", "AdaMax", "Nadam", "Momentum", "RMSProp", "Adagrad", "Adadelta", "Ftrl")
    for number in ("", "_1", "_2")
}
_LAST = re.compile(r"beta[12]_power(_\d+)?|.*_(moment[12]|velocity|beta[12]_pow_acc)_\d+")
_AVERAGED = re.compile(r"(.*[_-])?(ema|shadow|swa|averaged?|avg)([_-].*)?", re.IGNORECASE)


def optimiser_keys(keys: Iterable[str]) -> set[str]:
    """The keys of an optimiser's state, as any of the frameworks names them.

    Example:
        >>> sorted(optimiser_keys(["params/w", "opt_state/0/mu/w", "d.weight", "optim_d.state.0.exp_avg", "w", "w/Adam"]))
        ['opt_state/0/mu/w', 'optim_d.state.0.exp_avg', 'w/Adam']
    """
    names = {normal(key): key for key in keys}
    return {key for name, key in names.items() if _is_optimiser(name.split("/"), names)}


def _is_optimiser(parts: list[str], names: dict[str, str]) -> bool:
    last = parts[-1]
    if last in _TORCH or _LAST.fullmatch(last) or (last in _SLOTS and "/".join(parts[:-1]) in names):
        return True
    for place, part in enumerate(parts[:-1]):
        if part in _CONTAINERS:
            return True
        # A chain of optimisers is a list.
        after = [name for name in parts[place + 1 : place + 3] if not name.isdecimal()][:1]
        if _NAME.fullmatch(part) and set(after) & _INSIDE:
            return True
        if part in _TWINS and _has_twin(parts, place, names):
            return True
    return False


def _has_twin(parts: list[str], place: int, names: dict[str, str]) -> bool:
    """Whether a `mu` or `nu` is a moment of Optax. Then the number of steps is beside it, or the other moment in a list."""
    if "/".join((*parts[:place], "count")) in names:
        return True
    listed = place and parts[place - 1].isdecimal()
    return bool(listed) and "/".join((*parts[:place], _TWINS[parts[place]], *parts[place + 1 :])) in names


def is_averaged(prefix: str) -> bool:
    """Whether a block is an averaged copy, judging by its name.

    Example:
        >>> is_averaged("params_ema.attn."), is_averaged("G.attn.")
        (True, False)
    """
    return any(_AVERAGED.fullmatch(part) for part in normal(prefix).split("/"))


def averages_without_names(keys: Iterable[str]) -> str:
    """A note on averaged copies in a list, or under names without separators. "" if there are none.

    Example:
        >>> averages_without_names(["shadow_params.0", "decay"])[:45]
        'shadow_params holds averaged copies without n'
    """
    names = [normal(key).split("/") for key in keys]
    if any(
        part == "shadow_params" and after.isdecimal()
        for name in names
        for part, after in itertools.pairwise(name)
    ):
        return (
            "shadow_params holds averaged copies without names, in the order of model.parameters(), as torch_ema writes them. "
            "Load the file there, call ema.copy_to(model.parameters()), and save model.state_dict()"
        )
    live = {"".join(name[1:]) for name in names if len(name) > 2}
    joined = [name[-1] for name in names if len(name) > 1 and name[-2] == "model_ema"]
    if len(live & set(joined)) > 2:
        return (
            "model_ema holds averaged copies under names without dots, as LitEma writes them. Load the file there and save "
            "model.state_dict() inside `with model.ema_scope():`"
        )
    return ""
