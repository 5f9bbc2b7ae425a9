"""The target of a port: checks that it may be written, finds its format, and writes it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from selfattn_core.files.targets import would_replace
from selfattn_core.porting.dialects.catalogue import dialect
from selfattn_core.porting.dialects.dialect import Dialect
from selfattn_core.porting.errors import PortError, target_exists
from selfattn_core.porting.formats import Tensors
from selfattn_core.porting.formats.write import write_tensors
from selfattn_core.porting.report import PortReport
from selfattn_core.porting.translation.block import Block
from selfattn_core.porting.translation.lazy import LazyArrays
from selfattn_core.porting.translation.to_dialect import separator
from selfattn_core.porting.whole_checkpoint import WHOLE, Renamed, write_whole
from selfattn_core.problems import Remedy, Text
from selfattn_core.weights import FORMAT, VERSION, PathLike

__all__ = ["Target", "checked_target"]

_SUFFIXES = {
    ".safetensors": "safetensors",
    ".npz": "npz",
    ".pt": "torch",
    ".pth": "torch",
    ".bin": "torch",
    ".h5": "keras",
    ".msgpack": "msgpack",
}


@dataclass(frozen=True)
class Target:
    """The file or folder that a port writes.

    Args:
        path: the path of the file or folder.
        dialect: the dialect of the target.
        format: the format of the target.
        source: the path of the source.
        whole: whether the target is the whole source, with its blocks in another form.
    """

    path: Path
    dialect: Dialect
    format: str
    source: Path
    whole: bool

    def check_whole(self, tensors: Tensors) -> None:
        """Refuse a whole checkpoint in another format than the source's, or with names that no model loads."""
        whole = Remedy("whole", value=True)
        if tensors.format not in WHOLE or self.format != tensors.format or self.source.is_dir():
            raise PortError(
                (
                    f"{self.path}: ",
                    whole,
                    f" writes a PyTorch or .safetensors file in the source's own format, and {self.source} is ",
                    f"{tensors.format}. Port its blocks without ",
                    whole,
                    ".",
                ),
                kind="whole",
            )
        if separator(self.dialect) != "." or self.dialect.name == "canonical":
            torch = Remedy("to", "torch")
            other = f"; {self.dialect.name} has others."
            raise PortError((whole, " writes names that a model loads, such as ", torch, other), kind="whole")

    def write(
        self,
        path: Path,
        blocks: Sequence[Block],
        arrays: Mapping[str, NDArray[Any]],
        report: PortReport | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        """Write the target, or its content to another path.

        Args:
            path: the path to write.
            blocks: the ported blocks.
            arrays: their tensors, by the keys of the target.
            report: the report, which is stored in the file.
            overwrite: whether an existing file or folder may be replaced.

        Raises:
            PortError: if it cannot be written. An existing file or folder is then unchanged.
        """
        metadata = {"source": f"{self.source.name} ({report.source_dialect})" if report else ""}
        if self.dialect.name == "canonical":
            configs = {block.name: block.config.to_dict() for block in blocks}
            content: object = configs.get("", configs)
            metadata = {"format": FORMAT, "version": VERSION, "config": json.dumps(content), **metadata}
        if report:
            metadata["port"] = json.dumps(report.to_dict(), ensure_ascii=False)
        if self.whole:
            renamed = [_renamed(block, arrays) for block in blocks]
            write_whole(self.source, path, self.format, renamed, metadata, overwrite=overwrite)
        else:
            write_tensors(path, arrays, format=self.format, metadata=metadata, overwrite=overwrite)


def _renamed(block: Block, arrays: Mapping[str, NDArray[Any]]) -> Renamed:
    prefix = block.found.prefix
    tensors = {key.removeprefix(prefix): partial(arrays.__getitem__, key) for key in block.exported.tensors}
    return Renamed(prefix, block.source_keys, LazyArrays(tensors), block.config.kv_pool)


def checked_target(
    path: Path,
    to: str,
    source: Path,
    *,
    whole: bool,
    overwrite: bool,
    read: Mapping[str, PathLike | None],
) -> Target:
    """A target that may be written.

    Args:
        path: the path of the target.
        to: the dialect of the target.
        source: the path of the source.
        whole: as in `port`.
        overwrite: whether an existing target may be replaced.
        read: the files that the port reads, by what they are. The target must not replace one of them.

    Raises:
        PortError: if the target may not be written.
    """
    chosen = dialect(to)
    chosen.check_expressible("written")
    format = _format(path, chosen)
    if not overwrite and path.exists():
        raise target_exists(path)
    if not path.parent.is_dir():
        raise PortError(
            f"{path}: there is no folder {path.parent}. Nothing was written.", kind="folder_missing"
        )
    _check_kept(path, read)
    return Target(path, chosen, format, source, whole)


def _format(target: Path, to: Dialect) -> str:
    """The format that the suffix of the target chooses."""
    format = _SUFFIXES.get(target.suffix, "" if target.suffix else "orbax")
    if target.suffix == ".orbax":
        format = "orbax"
    if not format:
        raise PortError(
            f"{target}: {target.suffix} cannot be written. Expected {', '.join(_SUFFIXES)}, or a folder without suffix for Orbax.",
            kind="target_format",
        )
    owner = {"keras": "Keras", "orbax": "Orbax", "msgpack": "Flax"}.get(format)
    if owner and separator(to) != "/":
        better = Remedy("to", "keras" if format == "keras" else "flax")
        raise PortError(
            (
                f"{target}: a file of {owner} cannot have the keys of {to.name}. Pass ",
                better,
                ", or name a .safetensors file.",
            ),
            kind="target_format",
        )
    if format != "safetensors" and to.name == "canonical":
        other: Text = (
            (", or, for a PyTorch state dict, pass ", Remedy("to", "torch")) if format == "torch" else ()
        )
        raise PortError(
            (
                f"{target}: the canonical form is a .safetensors file, and `load` reads no other format. Name one",
                *other,
                ".",
            ),
            kind="target_format",
        )
    return format


def _check_kept(target: Path, read: Mapping[str, PathLike | None]) -> None:
    """Refuse a target that the port reads, because a port writes less than it reads."""
    for what, path in read.items():
        if path and (would_replace(target, path) or (target.is_dir() and would_replace(path, target))):
            raise PortError(
                f"{target}: is the {what}, a part of it, or its folder. The port would delete what it does not write. "
                "Name another target. Nothing was written.",
                kind="target_is_read",
                names=[what],
            )
