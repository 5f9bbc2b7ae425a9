"""Loading state dicts that other versions or other tools wrote."""

from typing import Any

from torch import nn

__all__ = ["accept_older"]


def accept_older(_layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Bring the entries of a layer to today's names and shapes. A hook for `register_load_state_dict_pre_hook`.

    gamma may have any shape of one element, because many layers keep a scalar. It may be called `weight`, because some
    loaders rename everything that has "gamma" in its name.

    Args:
        state_dict: the entries. torch passes a copy to hooks, and this function changes it.
        prefix: prefix of the layer's own entries.
    """
    name = f"{prefix}gamma"
    renamed = f"{prefix}weight"
    if name not in state_dict and renamed in state_dict:
        state_dict[name] = state_dict.pop(renamed)
    if name in state_dict and state_dict[name].numel() == 1:
        state_dict[name] = state_dict[name].reshape(1)
