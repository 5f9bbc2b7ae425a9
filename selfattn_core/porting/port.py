"""A port from one file to another, verified before anything is written."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from selfattn_core.config import SelfAttentionConfig
from selfattn_core.files.targets import would_replace
from selfattn_core.porting.blocks.bystanders import optimiser_keys
from selfattn_core.porting.blocks.find import Found, find_blocks, index_of
from selfattn_core.porting.blocks.keys import normal
from selfattn_core.porting.blocks.match import match, prefixes
from selfattn_core.porting.blocks.metadata import is_canonical
from selfattn_core.porting.blocks.plan import plan
from selfattn_core.porting.dialects.dialect import Dialect, dialect
from selfattn_core.porting.dialects.settings import settings_of
from selfattn_core.porting.errors import PortError, VerificationError, target_exists
from selfattn_core.porting.formats import Tensors, open_tensors
from selfattn_core.porting.formats.scratch import scratch_folder
from selfattn_core.porting.formats.write import write_tensors
from selfattn_core.porting.inspect import candidates
from selfattn_core.porting.report import BlockReport, Check, PortReport, TensorReport
from selfattn_core.porting.translation.from_dialect import Imported, checksum, import_block
from selfattn_core.porting.translation.lazy import LazyArrays
from selfattn_core.porting.translation.to_dialect import Exported, export_block, separator
from selfattn_core.porting.verify import check_framework, check_output, read_io
from selfattn_core.porting.whole_checkpoint import WHOLE, Renamed, write_whole
from selfattn_core.problems import Remedy, Text, in_command, in_python
from selfattn_core.weights import FORMAT, VERSION

__all__ = ["load", "port"]

Array = NDArray[Any]
PathLike = str | os.PathLike[str]
DTYPES = ("float16", "float32", "float64")


def port(
    source: PathLike,
    target: PathLike,
    *,
    dialect: str | None = None,
    prefix: str | Sequence[str] | None = None,
    to: str = "canonical",
    settings: Mapping[str, str | bool | float] | None = None,
    check: PathLike | None = None,
    dtype: str | None = None,
    keep_spectral_norm: bool = False,
    strict: bool = True,
    dry_run: bool = False,
    overwrite: bool = False,
    whole: bool = False,
) -> PortReport:
    """Bring attention weights from one file into another.

    Nothing is written unless every check that ran has passed.

    Args:
        source: a checkpoint, of a whole network or of the layer alone.
        target: where to; its suffix chooses the format.
        dialect: what the source is: a built-in name or a `.toml` file. Only a canonical file says so itself.
        prefix: which block, or several, with * for any text; by default the only one.
        to: dialect of the target.
        settings: what the source does not say, by name, for example {"use_scale": False}.
        check: an `.npz` with x and y, an input of the source's layer and its output, in its layout.
        dtype: "float16", "float32" or "float64"; by default the source's.
        keep_spectral_norm: keep raw kernels with u and v where both sides have them, instead of dividing.
        strict: whether keys under a block's prefix that nothing reads are an error.
        dry_run: do everything but write.
        overwrite: whether an existing target may be replaced.
        whole: whether the target is the whole source, in its own format, with every attention block that the dialect finds
            (or those of `prefix`) in the form of `to` and every other tensor as it is. An optimiser's state is left out.

    Returns:
        What was done. Every check that ran has passed.

    Raises:
        VerificationError: a PortError whose `report` says which check failed; nothing was written.
        PortError: if it cannot be done, with every reason; nothing was written.
        ModuleNotFoundError: if a format's own library is not installed.

    Example:
        >>> import tempfile
        >>> from selfattn_core import SelfAttentionConfig, init_params, save
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = SelfAttentionConfig(16)
        ...     save(f"{folder}/a.safetensors", config, init_params(config, seed=0))
        ...     report = port(f"{folder}/a.safetensors", f"{folder}/b.npz", to="heykeetae")
        ...     report.passed, report.blocks[0].tensors[0].target
        (True, 'query_conv.weight')
    """
    for what, path in (("source", source), ("target", target), ("file of check", check)):
        if path is not None and not os.fspath(path):
            raise PortError(f"the path of the {what} is empty; name a file.", kind="path", names=[what])
    return _Port(
        Path(source),
        Path(target),
        to,
        dialect,
        _Options(check, dtype, keep_spectral_norm, strict, dry_run, overwrite, whole),
    ).run([prefix] if isinstance(prefix, str) else prefix, settings or {})


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
    """One block of a checkpoint as a config and canonical parameters.

    Args:
        path: a checkpoint.
        dialect: as in `port`.
        prefix: which block; by default the only one.
        settings: as in `port`.
        dtype: as in `port`.
        keep_spectral_norm: as in `port`.
        strict: as in `port`.

    Warns:
        UserWarning: if stored vectors u and v of spectral norm have not the length 1, as averages of them have; or if a
            file of a layer of this library does not say its `kv_pool`, and `settings` do not either.

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
    _check_dtype(dtype)
    with open_tensors(path) as tensors:
        chosen = _source_dialect(tensors, dialect)
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
                f"{path}: {prefix!r} names {len(found)} blocks: {names}; name one.",
                kind="several_blocks",
                names=[block.prefix for block in found],
            )
        if any(one.setting == "kv_pool" for one in found[0].plan.assumptions) and "kv_pool" not in (
            settings or {}
        ):
            assert found[0].plan.config is not None  # noqa: S101 - it has no problems
            pool = found[0].plan.config.kv_pool
            warnings.warn(
                f"{path}: does not say whether the layer pools key and value, and its tensors do not show it: kv_pool = {pool} is "
                f'assumed. Say it with settings={{"kv_pool": {pool}}}, or with the window of the layer that was saved.',
                stacklevel=2,
            )
        block = import_block(found[0].plan, tensors.read, dtype=dtype, keep_spectral_norm=keep_spectral_norm)
        for note in block.notes:
            warnings.warn(f"{path}: {in_python(note)}.", stacklevel=2)
        return block.config, dict(block.params)


@dataclass(frozen=True)
class _Options:
    check: PathLike | None
    dtype: str | None
    keep_spectral_norm: bool
    strict: bool
    dry_run: bool
    overwrite: bool
    whole: bool


@dataclass(frozen=True)
class _Block:
    """A block on its way."""

    found: Found
    name: str
    config: SelfAttentionConfig
    imported: Imported
    exported: Exported


class _Port:
    def __init__(
        self, source: Path, target: Path, to: str, source_dialect: str | None, options: _Options
    ) -> None:
        _check_dtype(options.dtype)
        self.source, self.target, self.options = source, target, options
        self.source_dialect = source_dialect
        self.to = dialect(to)
        if self.to.refused:
            raise PortError(
                f"{self.to.name} cannot be written: {self.to.reason}. Instead: {self.to.instead}.",
                kind="dialect_refused",
                names=[self.to.name],
            )
        self.container = _container(target, self.to)
        if not options.overwrite and target.exists():
            raise target_exists(target)
        if not target.parent.is_dir():
            raise PortError(
                f"{target}: there is no folder {target.parent}; nothing was written.", kind="folder_missing"
            )
        _check_kept(
            target,
            {
                "source": source,
                "file of check": options.check,
                "dialect": source_dialect,
                "dialect of to": to,
            },
        )

    def run(
        self,
        prefix: Sequence[str] | None,
        settings: Mapping[str, str | bool | float],
    ) -> PortReport:
        with open_tensors(self.source) as tensors:
            chosen = _source_dialect(tensors, self.source_dialect)
            if self.options.whole:
                self._check_whole_fits(tensors)
                prefix = prefix or prefixes(chosen, index_of(tensors)) or None
            found = find_blocks(
                tensors, chosen, settings_of(chosen, settings), prefix=prefix, strict=self.options.strict
            )
            blocks = [self._block(one, tensors, alone=len(found) == 1) for one in found]
            if self.options.whole:
                trips = self._check_whole(blocks, tensors)
            else:
                trips = self._check_round_trip(blocks)
            checks = [*self._check_source(chosen, blocks), *trips]
            report = PortReport(
                str(self.source),
                tensors.container,
                f"{chosen.name}: {chosen.title}",
                str(self.target),
                self.container,
                f"{self.to.name}: {self.to.title}",
                len(tensors) - _used(blocks, tensors) - len(optimiser_keys(tensors)),
                tuple(_block_report(block) for block in blocks),
                tuple(checks),
                optimiser_state=len(optimiser_keys(tensors)),
            )
            layers = {block.name: (block.config, block.imported.params) for block in blocks}
            report = replace(report, checks=(*report.checks, *check_framework(self.to.name, layers)))
            if not report.passed:
                raise VerificationError(report)
            if self.options.dry_run:
                return report
            report = replace(report, written=True)
            self._write(self.target, blocks, report, overwrite=self.options.overwrite)
        return report

    def _block(self, found: Found, tensors: Tensors, *, alone: bool) -> _Block:
        try:
            imported = import_block(
                found.plan,
                tensors.read,
                dtype=self.options.dtype,
                keep_spectral_norm=self.options.keep_spectral_norm,
            )
        except PortError as error:
            block = f"block {found.prefix}: " if found.prefix else ""
            raise error.within(f"{self.source}: {block}") from error
        if self.options.whole:
            exported = export_block(self.to, imported.config, imported.params, prefix=found.prefix)
            return _Block(found, found.prefix.rstrip("./"), imported.config, imported, exported)
        name = "" if alone else normal(found.prefix).replace("/", ".")
        if not alone and not name:
            name = "block"
        sep = separator(self.to)
        prefix = name.replace(".", sep) + sep if name else ""
        exported = export_block(self.to, imported.config, imported.params, prefix=prefix)
        return _Block(found, name, imported.config, imported, exported)

    def _check_source(self, chosen: Dialect, blocks: list[_Block]) -> list[Check]:
        if self.options.check is None:
            return [
                Check("source's own output", "not run", "not asked for; --check io.npz with its x and y does")
            ]
        if len(blocks) > 1:
            raise PortError(
                (
                    Remedy("check"),
                    f": x and y are of one block, and {len(blocks)} are ported: name one with ",
                    Remedy("prefix"),
                    ".",
                ),
                kind="several_blocks",
                names=[block.found.prefix for block in blocks],
            )
        (block,) = blocks
        path = Path(self.options.check)
        x, y = read_io(path, chosen.layout, open_tensors)
        try:
            block.config.check_input(x.shape, layer=str(path))
        except ValueError as error:
            raise PortError(f"{error}", kind="bad_io_file") from error
        return [check_output("source's own output", block.config, block.imported.params, x, y)]

    def _check_whole_fits(self, tensors: Tensors) -> None:
        whole = Remedy("whole", value=True)
        if tensors.container not in WHOLE or self.container != tensors.container or self.source.is_dir():
            raise PortError(
                (
                    f"{self.target}: ",
                    whole,
                    f" writes a file of torch or .safetensors in the source's own format, and {self.source} is ",
                    f"{tensors.container}; port its blocks without ",
                    whole,
                    ".",
                ),
                kind="whole",
            )
        if separator(self.to) != "." or self.to.name == "canonical":
            torch = Remedy("to", "torch")
            raise PortError(
                (whole, " writes names that a model loads, such as ", torch, f"; {self.to.name} has others."),
                kind="whole",
            )

    def _check_whole(self, blocks: list[_Block], tensors: Tensors) -> list[Check]:
        """Write to a folder of our own, read back: the blocks as they were made, and everything else as it was."""
        new = {key: block for block in blocks for key in block.exported.tensors}
        gone = {key for block in blocks for key in _keys_of(block)} | optimiser_keys(tensors)
        with scratch_folder() as folder:
            trial = folder / self.target.name
            self._write(trial, blocks, None, overwrite=False)
            with open_tensors(trial) as written:
                others = [key for key in tensors if key not in gone]
                wrong = [
                    key
                    for key in new
                    if key not in written or _mark(written.read(key)) != _mark(new[key].exported.tensors[key])
                ]
                changed = [
                    key
                    for key in others
                    if key not in written
                    or written[key] != tensors[key]
                    or _mark(written.read(key)) != _mark(tensors.read(key))
                ]
                extra = [key for key in written if key not in new and key not in others]
                if wrong or changed or extra:
                    return [
                        Check(
                            "round trip",
                            "failed",
                            f"came back changed: {', '.join((*wrong, *changed, *extra)[:20])}",
                        )
                    ]
                return [
                    Check(
                        "round trip",
                        "passed",
                        f"{len(new)} tensors written, read back and compared bit for bit",
                    ),
                    Check(
                        "everything else", "passed", f"{len(others)} tensors are the source's, bit for bit"
                    ),
                    *(self._check_reimport(block, written) for block in blocks),
                ]

    def _check_round_trip(self, blocks: list[_Block]) -> list[Check]:
        """Write to a folder of our own, read back, compare the bits, and import what was read."""
        name = "round trip"
        with scratch_folder() as folder:
            trial = folder / self.target.name
            self._write(trial, blocks, None, overwrite=False)
            with open_tensors(trial) as tensors:
                wrong = [
                    key
                    for block in blocks
                    for key in block.exported.tensors
                    if key not in tensors or _mark(tensors.read(key)) != _mark(block.exported.tensors[key])
                ]
                held = sum(len(block.exported.tensors) for block in blocks)
                if wrong or len(tensors) != held:
                    return [
                        Check(
                            name,
                            "failed",
                            f"{len(wrong)} of {held} tensors came back changed: {', '.join(wrong)}",
                        )
                    ]
                return [
                    Check(name, "passed", f"{held} tensors written, read back and compared bit for bit"),
                    *(self._check_reimport(block, tensors) for block in blocks),
                ]

    def _check_reimport(self, block: _Block, tensors: Tensors) -> Check:
        """What the target's dialect reads from the target is the same layer."""
        name = f"read back as {self.to.name}{f', {block.name}' if block.name else ''}"
        given: dict[str, str | bool | float] = {}
        if not self.to.kv_pool_stored:
            given["kv_pool"] = block.config.kv_pool
        if not self.to.gamma_saved and not self.to.gamma_keys:
            given["gamma"] = float(block.imported.params["gamma"][0])
        settings = settings_of(self.to, given)
        index = index_of(tensors)
        prefix = f"{normal(block.name)}/" if block.name else ""
        planned = plan(match(self.to, index, prefix, averaged=settings.ema), tensors, settings)
        if planned.problems or planned.match.missing:
            reasons = (*map(str, planned.problems), *planned.match.missing)
            return Check(name, "failed", "; ".join(reasons))
        again = import_block(planned, tensors.read, keep_spectral_norm=block.config.spectral_norm)
        if planned.match.unused or block.exported.exact:
            return Check(name, *_comparison(block, again))
        x = np.random.Generator(np.random.PCG64(1)).standard_normal(
            (2, 2 * block.config.kv_pool + 1, 3 * block.config.kv_pool + 1, block.config.channels)
        )
        from selfattn_core import spec

        y = spec.forward(
            again.config, {key: array.astype(np.float64) for key, array in again.params.items()}, x
        )
        return check_output(name, block.config, block.imported.params, x, y)

    def _write(self, path: Path, blocks: list[_Block], report: PortReport | None, *, overwrite: bool) -> None:
        lines = [line for block in report.blocks for line in block.tensors] if report else []
        sums = {line.target: line.sha256 for line in lines}
        tensors = LazyArrays(
            {
                key: partial(_unchanged, block.exported.tensors, key, sums.get(key))
                for block in blocks
                for key in block.exported.tensors
            }
        )
        source = f"{self.source.name} ({report.source_dialect})" if report else ""
        metadata = {"source": source}
        if self.options.whole:
            if report:
                metadata["port"] = json.dumps(report.to_dict(), ensure_ascii=False)
            renamed = [_renamed(block, sums) for block in blocks]
            write_whole(self.source, path, self.container, renamed, metadata, overwrite=overwrite)
            return
        if self.to.name == "canonical":
            configs = {block.name: block.config.to_dict() for block in blocks}
            whole: object = configs.get("", configs)
            metadata = {"format": FORMAT, "version": VERSION, "config": json.dumps(whole), **metadata}
        if report:
            metadata["port"] = json.dumps(report.to_dict(), ensure_ascii=False)
        write_tensors(path, tensors, container=self.container, metadata=metadata, overwrite=overwrite)


def _keys_of(block: _Block) -> set[str]:
    """The keys of the source that a block was made of, or that say nothing about its function."""
    found = block.found.plan.match
    return {*found.used, *found.ignored}


def _renamed(block: _Block, sums: Mapping[str, str]) -> Renamed:
    prefix = block.found.prefix
    tensors = LazyArrays(
        {
            key.removeprefix(prefix): partial(_unchanged, block.exported.tensors, key, sums.get(key))
            for key in block.exported.tensors
        }
    )
    return Renamed(prefix, frozenset(_keys_of(block)), tensors, block.config.kv_pool)


def _comparison(block: _Block, again: Imported) -> tuple[Literal["passed", "failed"], str]:
    """Whether what was read back is the same layer bit for bit; biases of zeros that one side lacks are the same function."""
    there, here = again.origins, block.imported.origins
    if _without_biases(again.config) != _without_biases(block.config):
        return "failed", f"another layer: {again.config}"
    wrong = [name for name in there if name in here and there[name].sha256 != here[name].sha256]
    made = [name for name in there if name not in here]
    gone = [name for name in here if name not in there]
    wrong += [name for name in made if again.params[name].any()]
    wrong += [name for name in gone if block.imported.params[name].any()]
    if wrong:
        return "failed", f"other tensors: {', '.join(wrong)}"
    detail = "the same config and bits"
    if made or gone:
        detail = (
            f"the same bits; {', '.join(made or gone)} {'are made, and' if made else 'are left out:'} zeros"
        )
    return "passed", detail


def _without_biases(config: SelfAttentionConfig) -> SelfAttentionConfig:
    return replace(config, use_bias=False)


def _check_kept(target: Path, read: Mapping[str, PathLike | None]) -> None:
    """Refuse a target that is read from: what a port writes is less than what it reads."""
    for what, path in read.items():
        # A dialect is a name, or else a file of this kind.
        if path is None or ("dialect" in what and Path(path).suffix != ".toml"):
            continue
        if would_replace(target, path) or (target.is_dir() and would_replace(path, target)):
            raise PortError(
                f"{target}: is the {what}, a part of it, or the folder that it is in; a port would lose what it does not carry. "
                "Name another target. Nothing was written.",
                kind="target_is_read",
                names=[what],
            )


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise PortError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}.", kind="dtype")


_SUFFIXES = {
    ".safetensors": "safetensors",
    ".npz": "npz",
    ".pt": "torch",
    ".pth": "torch",
    ".bin": "torch",
    ".h5": "keras",
    ".msgpack": "msgpack",
}


def _container(target: Path, to: Dialect) -> str:
    """The format that the target's name asks for."""
    container = _SUFFIXES.get(target.suffix, "" if target.suffix else "orbax")
    if target.suffix == ".orbax":
        container = "orbax"
    if not container:
        raise PortError(
            f"{target}: {target.suffix} cannot be written; expected {', '.join(_SUFFIXES)}, or a folder without suffix for Orbax.",
            kind="target_format",
        )
    owner = {"keras": "Keras", "orbax": "Orbax", "msgpack": "Flax"}.get(container)
    if owner and separator(to) != "/":
        better = Remedy("to", "keras" if container == "keras" else "flax")
        raise PortError(
            (
                f"{target}: a file of {owner} has no keys like those of {to.name}; say ",
                better,
                ", or name a .safetensors file.",
            ),
            kind="target_format",
        )
    if container != "safetensors" and to.name == "canonical":
        other: Text = (
            ("; for a state dict of ours say ", Remedy("to", "torch")) if container == "torch" else ()
        )
        raise PortError(
            (
                f"{target}: the canonical form is a .safetensors file, and nothing would load another; name one",
                *other,
                ".",
            ),
            kind="target_format",
        )
    return container


def _source_dialect(tensors: Tensors, name: str | None) -> Dialect:
    if name is not None:
        return dialect(name)
    if is_canonical(tensors):
        return dialect("canonical")
    found = candidates(tensors)
    fits = (
        f"its keys fit {', '.join(found)}"
        if found
        else "its keys fit none of them; `selfattn inspect` says why"
    )
    raise PortError(
        (
            f"{tensors.path}: say with ",
            Remedy("dialect"),
            f" which dialect it is: {fits}. Equal keys do not mean equal functions: what wrote the file decides.",
        ),
        kind="dialect_needed",
        names=found,
    )


def _unchanged(tensors: Mapping[str, Array], key: str, sha256: str | None) -> Array:
    """A tensor of the target, which is made anew at every access: the same as the one that was verified."""
    array = tensors[key]
    if sha256 is not None and checksum(array) != sha256:
        raise PortError(f"{key}: its source has changed while it was ported; nothing was written.")
    return array


def _mark(array: Array) -> tuple[np.dtype[Any], tuple[int, ...], str]:
    """What two arrays have in common if they are the same, without both in memory."""
    return array.dtype, array.shape, checksum(array)


def _used(blocks: list[_Block], tensors: Tensors) -> int:
    index = index_of(tensors)
    return sum(len(index.under(block.found.plan.match.prefix)) for block in blocks)


def _block_report(block: _Block) -> BlockReport:
    origins, planned = block.imported.origins, block.found.plan
    lines = []
    for key in block.exported.tensors:
        dtype, shape, sha256 = _mark(block.exported.tensors[key])
        names = block.exported.made_of[key]
        came = [origins[name] for name in names if name in origins]
        sources = tuple(dict.fromkeys(source for origin in came for source in origin.sources))
        first = came[0] if came else None
        steps = (*(first.steps if first else ()), *block.exported.steps[key])
        lines.append(
            TensorReport(
                sources,
                first.shape if first and sources else (),
                first.dtype if first and sources else "",
                names,
                steps,
                key,
                shape,
                str(dtype),
                sha256,
            )
        )
    return BlockReport(
        block.found.prefix,
        block.name,
        planned.match.variant.name,
        block.config.to_dict(),
        tuple(lines),
        tuple(str(one) for one in planned.assumptions),
        (*planned.match.dialect.caveats, *block.exported.notes, *map(in_command, block.imported.notes)),
        planned.match.ignored,
        planned.match.unused,
    )
