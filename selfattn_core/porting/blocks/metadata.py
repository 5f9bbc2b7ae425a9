"""Reads what a file records about its layers: the configs of a canonical file, and the pooling, which no tensor shows."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from selfattn_core.config import SelfAttentionConfig
from selfattn_core.porting.blocks.keys import normal
from selfattn_core.porting.dialects.dialect import Dialect
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats import Tensors
from selfattn_core.weights import FORMAT, configs_of

__all__ = ["Stated", "is_canonical", "stated"]


@dataclass(frozen=True)
class Stated:
    """What a file records about its layers, by the name of the block in the form of `normal`.

    Args:
        configs: the configs of a canonical file. None for any other file.
        pools: the `kv_pool` of layers of this library in any other file.
    """

    configs: Mapping[str, SelfAttentionConfig] | None = None
    pools: Mapping[str, int] = field(default_factory=dict)


def is_canonical(tensors: Tensors) -> bool:
    """Whether the metadata of a file says that it is canonical."""
    return tensors.metadata.get("format") == FORMAT


def stated(tensors: Tensors, chosen: Dialect) -> Stated:
    """What a file records about the layers that a dialect finds in it.

    Raises:
        PortError: if a canonical file has a newer version, or its config cannot be read.
    """
    if chosen.name == "canonical" and is_canonical(tensors):
        try:
            configs = configs_of(tensors.path, tensors.metadata)
        except ValueError as error:
            raise PortError(str(error)) from error
        return Stated({normal(name): config for name, config in configs.items()})
    return Stated(pools={} if chosen.kv_pool_stored else _pools(tensors, chosen))


def _pools(tensors: Tensors, chosen: Dialect) -> dict[str, int]:
    """The pooling that a layer of this library stored in the file, or the pooling in the report that `port` stored there."""
    found = {normal(prefix): pool for prefix, pool in tensors.pools.items()}
    try:
        report = json.loads(tensors.metadata["port"])
        if report["target_dialect"].startswith(f"{chosen.name}:"):
            for block in report["blocks"]:
                config = SelfAttentionConfig.from_dict(block["config"])
                found.setdefault(normal(block["block"]), config.kv_pool)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        # Any program may write metadata with that name.
        return found
    return found
