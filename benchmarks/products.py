"""The matrix products of a step, without the rest of it: the ceilings of the benchmark."""

from collections.abc import Callable
from typing import Any

__all__ = ["PRODUCTS", "products", "row_local"]

Dot = Callable[..., Any]

PRODUCTS = {"forward": (1, 1), "train": (3, 3), "r1": (9, 5)}
"""The numbers of products in a step of an N×N array with an array of width Dk, and with one of width Dv."""


def products(step: str, dot: Dot, query: Any, key: Any, value: Any, weight: Any) -> dict[str, Any]:
    """The matrix products of a step in order, each on the results of earlier products, without other operations.

    Args:
        step: "forward", "train" or "r1".
        dot: `dot(a, b)`, `dot(a, b, "ta")` for aᵀ b and `dot(a, b, "tb")` for a bᵀ.
        query: (B, N, Dk).
        key: (B, N, Dk).
        value: (B, N, Dv).
        weight: (B, N, Dv).

    Returns:
        Arrays that together need every product. "rows" and "query" belong to query rows.
    """
    scores = dot(query, key, "tb")
    rows = dot(scores, value)
    if step == "forward":
        return {"rows": rows}
    d_scores = dot(weight, value, "tb")
    d_query, d_key, d_value = dot(d_scores, key), dot(d_scores, query, "ta"), dot(scores, weight, "ta")
    if step == "train":
        return {"rows": rows, "query": d_query, "key": d_key, "value": d_value}
    moved = dot(d_query, key, "tb")  # N×N, like the next two
    moved_key = dot(d_query, d_key, "tb")
    moved_value = dot(weight, d_value, "tb")
    return {
        "rows": rows,
        "query": dot(moved, key) + dot(moved_value, d_key),
        "key": dot(moved_key, query, "ta") + dot(d_scores, d_query, "ta"),
        "value": dot(moved, weight, "ta"),
    }


def row_local(step: str, blocks: list[dict[str, Any]], join: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """Join the products of blocks of query rows that need no other rows.

    Args:
        step: see `products`.
        blocks: the results of `products` for each block.
        join: concatenates arrays along the rows.
    """
    # In an R1 step the rest of "query" also needs the sums over blocks, which no product computes.
    names = [name for name in ("rows", "query") if name in blocks[0] and (name == "rows" or step == "train")]
    return {name: join([block[name] for block in blocks]) for name in names}
