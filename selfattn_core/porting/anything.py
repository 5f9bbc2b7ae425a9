"""What every adapter's `load` reads: a canonical file, or anybody's checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

import selfattn_core
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.porting.blocks.metadata import is_canonical
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats import open_tensors
from selfattn_core.porting.inspect import candidates
from selfattn_core.porting.port import load
from selfattn_core.weights import PathLike

__all__ = ["load_any"]


def load_any(
    path: PathLike,
    *,
    block: str | None = None,
    dialect: str | None = None,
    prefix: str | None = None,
    settings: Mapping[str, str | bool | float] | None = None,
    strict: bool = True,
) -> tuple[SelfAttentionConfig, dict[str, NDArray[Any]]]:
    """One layer as a config and canonical parameters.

    Args:
        path: the file.
        block: which layer of a canonical file that holds several.
        dialect: of another file; None for a canonical one.
        prefix: which block of another file.
        settings: what another file does not say.
        strict: whether tensors of another file under the prefix that nothing reads are an error.

    Warns:
        UserWarning: if stored vectors u and v of spectral norm have not the length 1, as averages of them have; or if a
            file of a layer of this library does not say its `kv_pool`, and `settings` do not either.

    Raises:
        FileNotFoundError: if there is no such canonical file.
        ValueError: if the file does not fit, or `block` is given with `dialect`, or the others without it.

    Example:
        >>> load_any("gan.pth", prefix="blocks.3.1")
        Traceback (most recent call last):
        ...
        ValueError: load: prefix says something of another file than a canonical one: pass dialect= as well; a layer of a canonical file is named by block=.
    """
    given = [name for name, value in (("prefix", prefix), ("settings", settings)) if value is not None]
    if dialect is None:
        if given:
            raise ValueError(
                f"load: {' and '.join(given)} says something of another file than a canonical one: pass dialect= as well; a "
                "layer of a canonical file is named by block=."
            )
        try:
            return selfattn_core.load(path, block=block)
        except ValueError:
            _check_canonical(Path(path))
            raise
    if block is not None:
        raise ValueError(
            f"load: block={block!r} names a layer of a canonical file; with dialect= pass prefix=, the beginning of its keys."
        )
    return load(path, dialect=dialect, prefix=prefix, settings=settings, strict=strict)


def _check_canonical(path: Path) -> None:
    """Say what to pass for a checkpoint that is none of ours; what cannot be read at all is refused by what reads ours."""
    try:
        with open_tensors(path) as tensors:
            if is_canonical(tensors):
                return
            found = candidates(tensors)
    except (PortError, ModuleNotFoundError):
        return
    fits = (
        f"its keys fit {', '.join(found)}"
        if found
        else "its keys fit none of them; `selfattn inspect` says why"
    )
    raise ValueError(
        f"{path}: is not a selfattn file, but a checkpoint of another kind ({tensors.container}): say with dialect= which: {fits}."
    )
