"""Names the tensors of a PyTorch checkpoint, whose dictionaries may be nested."""

from typing import Any

__all__ = ["names_and_wrappers", "names_of"]


def names_of(paths: list[tuple[str, ...]], value: Any) -> list[str]:
    """The names of the tensors in a loaded PyTorch file.

    Args:
        paths: the keys on the way to each tensor.
        value: the value that torch loaded.

    Example:
        >>> names_of([("state_dict", "module.w")], {"state_dict": {"module.w": 1}})
        ['w']
    """
    return names_and_wrappers(paths, value)[0]


def names_and_wrappers(paths: list[tuple[str, ...]], value: Any) -> tuple[list[str], dict[str, str]]:
    """The names of tensors, and the parts that were removed from all of them.

    If there is one dictionary of weights, its name is removed. So are the prefixes of parallel and compiled modules. If there
    are several dictionaries (the weights and their average), each keeps its name, so that the user has to choose.

    Args:
        paths: the keys on the way to each tensor.
        value: the value that torch loaded, or its stand-in.

    Returns:
        The names, and metadata: "container" is the dictionary, "stripped" the removed prefixes.

    Example:
        >>> names_and_wrappers([("state_dict", "module.w")], {"state_dict": {"module.w": 1}})
        (['w'], {'container': 'state_dict', 'stripped': 'module.'})
    """
    metadata = {}
    containers = {keys[0] for keys in paths if len(keys) > 1}
    weights = {name for name in containers if not _optimizer(value, name)}
    if len(weights) == 1 and all(len(keys) > 1 for keys in paths):
        (container,) = weights
        metadata["container"] = container
        paths = [keys[1:] if keys[0] == container else keys for keys in paths]
    names = [".".join(keys) for keys in paths]
    plain = [".".join(part for part in name.split(".") if part != "_orig_mod") for name in names]
    if plain != names and len(set(plain)) == len(plain):
        metadata["stripped"] = "_orig_mod."
        names = plain
    if names and all(name.startswith("module.") for name in names):
        metadata["stripped"] = metadata.get("stripped", "") + "module."
        names = [name.removeprefix("module.") for name in names]
    return names, metadata


def _optimizer(value: Any, name: str) -> bool:
    held = value.get(name) if isinstance(value, dict) else None
    return isinstance(held, dict) and {"state", "param_groups"} <= set(held)
