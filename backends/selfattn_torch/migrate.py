"""State dicts as other versions and other tools have written them, on their way into the layer."""

from typing import Any

from torch import nn

__all__ = ["accept_older"]


def accept_older(_layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Bring the entries of a layer to today's names and shapes; a `register_load_state_dict_pre_hook` hook.

    gamma may have any shape of one element, as in the many layers that keep a scalar, and may be called `weight`, to
    which some loaders rename whatever has "gamma" in its name.

    Args:
        state_dict: the entries; torch gives hooks a copy, which is changed.
        prefix: of the layer's own entries.
    """
    name = f"{prefix}gamma"
    renamed = f"{prefix}weight"
    if name not in state_dict and renamed in state_dict:
        state_dict[name] = state_dict.pop(renamed)
    if name in state_dict and state_dict[name].numel() == 1:
        state_dict[name] = state_dict[name].reshape(1)
