"""Names variables in `tf.train.Checkpoint` by their path of attributes.

A checkpoint names a variable by its shortest path. In Keras 3 that is often a place in a list, such as
`_trainable_variables/3` of the optimiser or of a SavedModel. The graph of objects in the same file has the path through the
layers.

Source: tensorflow/core/protobuf/trackable_object_graph.proto.
"""

from collections import Counter, deque
from dataclasses import dataclass

from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats.untrusted.limits import MAX_DEPTH, MAX_TENSORS
from selfattn_core.porting.formats.untrusted.protobuf import message, number, text

__all__ = ["names_of"]

# Attributes whose content is also in other attributes.
_LISTS = {
    f"{private}{name}"
    for private in ("", "_")
    for name in ("variables", "trainable_variables", "non_trainable_variables", "all_variables")
}
_OPTIMISER = {"optimizer", "_optimizer"}


@dataclass(frozen=True)
class _Node:
    children: tuple[tuple[int, str], ...]
    keys: tuple[tuple[str, str], ...]


def names_of(where: str, content: bytes) -> dict[str, str]:
    """Better names of variables from the graph, by their keys in the checkpoint.

    Args:
        where: the file, for messages.
        content: the graph's protocol buffer.

    Raises:
        PortError: if it is damaged.

    Example:
        >>> names_of("x", b"")
        {}
    """
    where = f"{where}: its graph of objects"
    nodes = [_node(where, node) for node in message(where, content).get(1, [])]
    if len(nodes) > MAX_TENSORS or sum(len(node.children) for node in nodes) > 20 * MAX_TENSORS:
        raise PortError(f"{where}: has {len(nodes)} objects, more than any checkpoint")
    paths = _paths(where, nodes)
    keys = [(paths.get(place, ""), name, key) for place, node in enumerate(nodes) for name, key in node.keys]
    # A SavedModel of Keras has only lists, and each variable's own name.
    listed = Counter((_parent(key), name) for _, name, key in keys)
    found: dict[str, str] = {}
    taken = {path for path, _, _ in keys}
    for path, name, key in keys:
        parents = set(_parent(key).split("/"))
        alone = name and listed[_parent(key), name] == 1 and parents & _LISTS and not parents & _OPTIMISER
        better = path or (name if alone and name not in taken else "")
        if better:
            taken.add(better)
            found[key] = better
    return found


def _parent(key: str) -> str:
    return key.partition("/.ATTRIBUTES")[0].rpartition("/")[0]


def _node(where: str, content: int | bytes) -> _Node:
    fields = message(where, content)
    children = [message(where, child) for child in fields.get(1, [])]
    attributes = [message(where, attribute) for attribute in fields.get(2, [])]
    return _Node(
        tuple((number(where, child, 1, 0), text(child, 2)) for child in children),
        tuple(
            (text(attribute, 2), text(attribute, 3))
            for attribute in attributes
            if text(attribute, 1) == "VARIABLE_VALUE"
        ),
    )


def _paths(where: str, nodes: list[_Node]) -> dict[int, str]:
    """The shortest path to each object outside lists of variables. Keras' `_kernel` gets the name `kernel`."""
    found: dict[int, str] = {0: ""} if nodes else {}
    waiting = deque([(0, 0)] if nodes else [])
    while waiting:
        here, depth = waiting.popleft()
        names = {name for _, name in nodes[here].children}
        for child, name in nodes[here].children:
            if child >= len(nodes):
                raise PortError(f"{where}: is damaged: it refers to object {child} of {len(nodes)}")
            if child in found or name in _LISTS or depth > MAX_DEPTH:
                continue
            plain = "kernel" if name == "_kernel" and "kernel" not in names else name
            found[child] = f"{found[here]}/{plain}".lstrip("/")
            waiting.append((child, depth + 1))
    return found
