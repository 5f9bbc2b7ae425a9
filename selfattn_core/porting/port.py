"""Ports attention weights from one file to another: open, find, translate, verify, write."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from selfattn_core.porting.blocks.bystanders import optimiser_keys
from selfattn_core.porting.blocks.find import Found, find_blocks, index_of
from selfattn_core.porting.blocks.keys import normal
from selfattn_core.porting.blocks.match import prefixes
from selfattn_core.porting.dialects.dialect import Dialect
from selfattn_core.porting.dialects.settings import settings_of
from selfattn_core.porting.errors import PortError, VerificationError
from selfattn_core.porting.formats import Tensors, open_tensors
from selfattn_core.porting.formats.scratch import scratch_folder
from selfattn_core.porting.inspect import source_dialect
from selfattn_core.porting.report import Check, PortReport
from selfattn_core.porting.round_trip import compare_blocks, compare_whole
from selfattn_core.porting.target import Target, checked_target
from selfattn_core.porting.translation.block import Block, translate
from selfattn_core.porting.translation.from_dialect import check_dtype
from selfattn_core.porting.translation.lazy import LazyArrays
from selfattn_core.porting.translation.to_dialect import separator
from selfattn_core.porting.verify import check_framework, check_output, read_io
from selfattn_core.problems import Remedy
from selfattn_core.weights import PathLike

__all__ = ["port"]


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
    """Port attention weights from one file to another.

    Nothing is written unless every check that ran has passed.

    Args:
        source: a checkpoint of a whole network or of the layer alone.
        target: the path to write. Its suffix chooses the format.
        dialect: the dialect of the source: a built-in name or a `.toml` file. Only a canonical file needs none.
        prefix: the prefix of one block or of several, with * for any text. By default the file must have one block only.
        to: the dialect of the target.
        settings: facts that the source does not contain, by name, for example {"use_scale": False}.
        check: an `.npz` with x and y, an input of the source's layer and its output, in the source's layout.
        dtype: "float16", "float32" or "float64". The default is the source's.
        keep_spectral_norm: keep raw kernels with u and v if both sides have them, instead of dividing.
        strict: whether unused keys under a block's prefix are an error.
        dry_run: do everything except writing.
        overwrite: whether an existing target may be replaced.
        whole: write the whole source in its own format. Every attention block that the dialect finds (or those of `prefix`)
            gets the form of `to`, and every other tensor stays as it is. An optimiser's state is left out.

    Returns:
        The report. Every check that ran has passed.

    Raises:
        VerificationError: a PortError whose `report` has the failed check. Nothing was written.
        PortError: if the port is not possible, with every reason. Nothing was written.
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
            raise PortError(f"the path of the {what} is empty. Name a file.", kind="path", names=[what])
    check_dtype(dtype)
    read = {"source": source, "file of check": check}
    # A dialect is a built-in name or a .toml file.
    read |= {
        what: name
        for what, name in (("dialect", dialect), ("dialect of to", to))
        if name and name.endswith(".toml")
    }
    goal = checked_target(Path(target), to, Path(source), whole=whole, overwrite=overwrite, read=read)
    wanted = [prefix] if isinstance(prefix, str) else prefix
    with open_tensors(source) as tensors:
        chosen = source_dialect(tensors, dialect)
        if whole:
            goal.check_whole(tensors)
            wanted = wanted or prefixes(chosen, index_of(tensors)) or None
        found = find_blocks(
            tensors, chosen, settings_of(chosen, settings or {}), prefix=wanted, strict=strict
        )
        blocks = [
            translate(
                one,
                tensors,
                goal.dialect,
                place=_place(one, goal, alone=len(found) == 1),
                dtype=dtype,
                keep_spectral_norm=keep_spectral_norm,
            )
            for one in found
        ]
        checks = _check_source(check, chosen, blocks)
        with ExitStack() as stack:
            trial = stack.enter_context(scratch_folder()) / goal.path.name
            made = {key: block.exported.tensors for block in blocks for key in block.exported.tensors}
            goal.write(trial, blocks, LazyArrays({key: partial(made[key].__getitem__, key) for key in made}))
            written = stack.enter_context(open_tensors(trial))
            if whole:
                checks += compare_whole(blocks, goal.dialect, written, tensors)
            else:
                checks += compare_blocks(blocks, goal.dialect, written)
            layers = {block.name: (block.config, block.imported.params) for block in blocks}
            checks += check_framework(goal.dialect.name, layers)
            report = _report(tensors, chosen, goal, blocks, checks)
            if not report.passed:
                raise VerificationError(report)
            if dry_run:
                return report
            # From here on an error is about the target, not about the folder of the trial.
            trial_files = stack.pop_all()
        report = replace(report, written=True)
        try:
            verified = LazyArrays({key: partial(written.read, key) for key in made})
            goal.write(goal.path, blocks, verified, report, overwrite=overwrite)
        finally:
            trial_files.close()
    return report


def _place(found: Found, goal: Target, *, alone: bool) -> tuple[str, str]:
    """The name of a block in the target, and its prefix there."""
    if goal.whole:
        return found.prefix.rstrip("./"), found.prefix
    if alone:
        return "", ""
    name = normal(found.prefix).replace("/", ".") or "block"
    separated = separator(goal.dialect)
    return name, name.replace(".", separated) + separated


def _check_source(check: PathLike | None, chosen: Dialect, blocks: Sequence[Block]) -> list[Check]:
    """Compare the block with an output of the source's own layer."""
    name = "source's own output"
    if check is None:
        return [Check(name, "not run", "pass --check io.npz, with an x and a y of that layer")]
    if len(blocks) > 1:
        text = f": x and y belong to one block, but {len(blocks)} blocks are ported. Choose one with "
        raise PortError(
            (Remedy("check"), text, Remedy("prefix"), "."),
            kind="several_blocks",
            names=[block.found.prefix for block in blocks],
        )
    (block,) = blocks
    path = Path(check)
    x, y = read_io(path, chosen.layout, open_tensors)
    try:
        block.config.check_input(x.shape, layer=str(path))
    except ValueError as error:
        raise PortError(f"{error}", kind="bad_io_file") from error
    return [check_output(name, block.config, block.imported.params, x, y)]


def _report(
    tensors: Tensors, chosen: Dialect, goal: Target, blocks: Sequence[Block], checks: Sequence[Check]
) -> PortReport:
    index, state = index_of(tensors), len(optimiser_keys(tensors))
    used = sum(len(index.under(block.found.plan.match.prefix)) for block in blocks)
    return PortReport(
        str(goal.source),
        tensors.format,
        f"{chosen.name}: {chosen.title}",
        str(goal.path),
        goal.format,
        f"{goal.dialect.name}: {goal.dialect.title}",
        len(tensors) - used - state,
        tuple(block.report() for block in blocks),
        tuple(checks),
        optimiser_state=state,
    )
