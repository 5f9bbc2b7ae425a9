"""Reads one layer from a checkpoint or a canonical file, as a config and canonical parameters."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import selfattn_core
from selfattn_core.arrays import Array
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.porting.blocks.find import find_blocks
from selfattn_core.porting.blocks.metadata import is_canonical
from selfattn_core.porting.dialects.settings import settings_of
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats import open_tensors
from selfattn_core.porting.inspect import fitting, source_dialect
from selfattn_core.porting.translation.from_dialect import check_dtype, import_block
from selfattn_core.problems import Remedy, in_python
from selfattn_core.weights import PathLike

__all__ = ["load", "load_any"]


def load(
    path: PathLike,
    *,
    dialect: str | None = None,
    prefix: str | None = None,
    settings: Mapping[str, str | bool | float] | None = None,
    dtype: str | None = None,
    keep_spectral_norm: bool = False,
    strict: bool = True,
) -> tuple[SelfAttentionConfig, dict[str, Array]]:
    """Read one block of a checkpoint as a config and canonical parameters.

    Args:
        path: a checkpoint.
        dialect: as in `port`.
        prefix: the prefix of the block. By default the file must have one block only.
        settings: as in `port`.
        dtype: as in `port`.
        keep_spectral_norm: as in `port`.
        strict: as in `port`.

    Warns:
        UserWarning: if stored vectors u and v of spectral norm do not have length 1, which happens if they are averages.
            Also if neither the file of a layer of this library nor `settings` contains its `kv_pool`.

    Raises:
        PortError: as `port`.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> arrays = {f"attn.{n}.weight": np.ones((2, 16, 1, 1)) for n in ("theta", "phi")}
        >>> arrays |= {"attn.g.weight": np.ones((8, 16, 1, 1)), "attn.o.weight": np.ones((16, 8, 1, 1))}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/gan.npz", **arrays, **{"attn.gamma": np.ones(())})
        ...     load(f"{folder}/gan.npz", dialect="biggan")[0].kv_pool
        2
    """
    check_dtype(dtype)
    with open_tensors(path) as tensors:
        chosen = source_dialect(tensors, dialect)
        found = find_blocks(
            tensors,
            chosen,
            settings_of(chosen, settings or {}),
            prefix=None if prefix is None else [prefix],
            strict=strict,
        )
        if len(found) > 1:
            names = ", ".join(block.prefix for block in found)
            raise PortError(
                f"{path}: {prefix!r} names {len(found)} blocks: {names}. Name one of them.",
                kind="several_blocks",
                names=[block.prefix for block in found],
            )
        if any(one.setting == "kv_pool" for one in found[0].plan.assumptions) and "kv_pool" not in (
            settings or {}
        ):
            assert found[0].plan.config is not None  # noqa: S101 - it has no problems
            pool = found[0].plan.config.kv_pool
            warnings.warn(
                f"{path}: does not record whether the layer pools key and value, and its tensors do not show it: kv_pool = {pool} "
                f'is assumed. Pass settings={{"kv_pool": {pool}}}, or the window of the layer that was saved.',
                stacklevel=2,
            )
        block = import_block(found[0].plan, tensors.read, dtype=dtype, keep_spectral_norm=keep_spectral_norm)
        for note in block.notes:
            warnings.warn(f"{path}: {in_python(note)}.", stacklevel=2)
        return block.config, dict(block.params)


def load_any(
    path: PathLike,
    *,
    block: str | None = None,
    dialect: str | None = None,
    prefix: str | None = None,
    settings: Mapping[str, str | bool | float] | None = None,
    strict: bool = True,
) -> tuple[SelfAttentionConfig, dict[str, Array]]:
    """Read one layer of a canonical file or of a checkpoint as a config and canonical parameters.

    Args:
        path: the file.
        block: the name of the layer, for a canonical file with several.
        dialect: the dialect of a checkpoint. None for a canonical file.
        prefix: the prefix of the block, for a checkpoint.
        settings: facts that a checkpoint does not contain.
        strict: whether unused tensors of a checkpoint under the prefix are an error.

    Warns:
        UserWarning: if stored vectors u and v of spectral norm do not have length 1, which happens if they are averages.
            Also if neither the file of a layer of this library nor `settings` contains its `kv_pool`.

    Raises:
        FileNotFoundError: if there is no such canonical file.
        ValueError: if the file does not fit, if `block` is passed with `dialect`, or if `prefix` or `settings` is passed
            without it.

    Example:
        >>> load_any("gan.pth", prefix="blocks.3.1")
        Traceback (most recent call last):
        ...
        ValueError: load: prefix is for a checkpoint, not for a canonical file. Pass dialect= as well, or name a layer of a canonical file with block=.
    """
    given = [name for name, value in (("prefix", prefix), ("settings", settings)) if value is not None]
    if dialect is None:
        if given:
            raise ValueError(
                f"load: {' and '.join(given)} {'are' if len(given) > 1 else 'is'} for a checkpoint, not for a canonical file. Pass "
                "dialect= as well, or name a layer of a canonical file with block=."
            )
        try:
            return selfattn_core.load(path, block=block)
        except ValueError:
            _check_canonical(Path(path))
            raise
    if block is not None:
        raise ValueError(
            f"load: block={block!r} names a layer of a canonical file. With dialect=, pass prefix=, the beginning of its keys."
        )
    return load(path, dialect=dialect, prefix=prefix, settings=settings, strict=strict)


def _check_canonical(path: Path) -> None:
    """Raise an error that says what to pass, if the file is somebody else's checkpoint. The caller refuses unreadable files."""
    try:
        with open_tensors(path) as tensors:
            if is_canonical(tensors):
                return
            fits, names = fitting(tensors)
    except (PortError, ModuleNotFoundError):
        return
    raise PortError(
        (
            f"{path}: is not a selfattn file, but a checkpoint of another kind ({tensors.format}). Choose its dialect with ",
            Remedy("dialect"),
            f": {fits}.",
        ),
        kind="dialect_needed",
        names=names,
    )
