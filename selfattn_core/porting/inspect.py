"""Lists the attention blocks of a checkpoint, the dialects that fit each block, and why other dialects do not fit."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from selfattn_core.porting.blocks.bystanders import averages_without_names, is_averaged, optimiser_keys
from selfattn_core.porting.blocks.find import index_of, shown
from selfattn_core.porting.blocks.keys import KeyIndex
from selfattn_core.porting.blocks.match import match, prefixes
from selfattn_core.porting.blocks.metadata import is_canonical, stated
from selfattn_core.porting.blocks.nearest import Group, Nearest, as_lines, groups, nearest
from selfattn_core.porting.blocks.plan import plan
from selfattn_core.porting.dialects.catalogue import dialect, dialect_names
from selfattn_core.porting.dialects.dialect import Dialect
from selfattn_core.porting.dialects.settings import settings_of
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats import Tensors, open_tensors
from selfattn_core.porting.formats.sharded import of_several
from selfattn_core.porting.report import listed
from selfattn_core.porting.translation.from_dialect import state_notes
from selfattn_core.problems import Remedy, in_command

__all__ = [
    "BlockFound",
    "Fit",
    "InspectReport",
    "candidates",
    "fitting",
    "inspect",
    "named",
    "source_dialect",
]


@dataclass(frozen=True)
class Fit:
    """How one dialect fits a block.

    Args:
        dialect: its name.
        title: its description in a few words.
        verdict: "fits"; "refused", if it fits and its layer cannot be ported; "almost", if some keys or shapes differ.
        variant: the variant of the dialect.
        config: the resulting layer. None if the shapes do not determine one.
        reasons: the reasons for "refused" and "almost".
        assumptions: what a port would assume.
        notes: what a user must know to choose.
    """

    dialect: str
    title: str
    verdict: Literal["fits", "refused", "almost"]
    variant: str
    config: dict[str, int | bool] | None
    reasons: tuple[str, ...]
    assumptions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BlockFound:
    """An attention block.

    Args:
        prefix: the beginning of its keys, in the file's own spelling.
        tensors: the number of tensors under the prefix.
        fits: the dialects that have names for its query, key and value.
    """

    prefix: str
    tensors: int
    fits: tuple[Fit, ...]


@dataclass(frozen=True)
class InspectReport:
    """A checkpoint.

    Args:
        path: the path of the file.
        format: the format of the file.
        metadata: the metadata of the file.
        tensors: shape and dtype by key.
        parameters: the number of elements of all tensors.
        blocks: attention blocks, in the order of their prefixes.
        left_out: the entries that look like tensors and are not, by name, with the reason.
        optimiser_state: keys of an optimiser's state. A port ignores them.
        note: what a user must know about the whole file.
        nearest: if no dialect fits, the dialects with the most keys in the file.
        groups: if no dialect fits, tensors whose shapes could be such a layer.
    """

    path: str
    format: str
    metadata: dict[str, str]
    tensors: dict[str, tuple[tuple[int, ...], str]]
    parameters: int
    blocks: tuple[BlockFound, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    optimiser_state: tuple[str, ...] = ()
    note: str = ""
    nearest: tuple[Nearest, ...] = ()
    groups: tuple[Group, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as a dictionary that JSON can hold."""
        return {"kind": "selfattn inspection", "version": 1, **asdict(self)}

    def to_text(self) -> str:
        """The report as text."""
        lines = [f"{self.path}: {self.format}, {len(self.tensors)} tensors, {self.parameters:,} numbers"]
        if self.left_out:
            lines.append(f"left out, since they are not numbers: {listed(list(self.left_out))}")
        if self.optimiser_state:
            lines.append(
                f"ignored: {len(self.optimiser_state)} tensors of an optimiser's state ({listed(self.optimiser_state, 3)})"
            )
        if self.note:
            lines.append(f"note: {self.note}")
        for block in self.blocks:
            kind = ", averaged copies, judging by the name" if is_averaged(block.prefix) else ""
            lines.append(f"block {block.prefix or 'at the top of the file'}, {block.tensors} tensors{kind}")
            for fit in block.fits:
                lines += _fit_lines(fit)
        verdicts = {fit.verdict for block in self.blocks for fit in block.fits}
        if verdicts <= {"almost"}:
            lines += self._without_a_dialect()
        if "fits" in verdicts:
            lines.append(
                "Equal keys do not mean equal functions. Choose the dialect of the code that wrote the file, and pass it to "
                "`selfattn port` with --from."
            )
        return "\n".join(lines)

    def _without_a_dialect(self) -> list[str]:
        head = (
            "No dialect fits" if self.blocks else "No dialect has names for an attention block of this file"
        )
        if self.groups:
            tail = ", but the shapes of these tensors could be an attention layer"
        else:
            tail = (
                ", and no tensors under one prefix have the shapes of an attention layer: 1×1 kernels C → D, C → D and C → C, "
                "or C → V and V → C, and one number"
            )
        return [
            f"{head}{tail}. `selfattn dialects` lists the dialects, --tensors the tensors here. A TOML file describes your own.",
            *as_lines(self.nearest if not self.blocks else (), self.groups),
        ]


def _fit_lines(fit: Fit) -> list[str]:
    variant = f", {fit.variant}" if fit.variant else ""
    lines = [f"  {fit.verdict:<7} {fit.dialect}: {fit.title}{variant}"]
    if fit.config:
        lines.append("          " + ", ".join(f"{name}={value}" for name, value in fit.config.items()))
    lines += [f"          {reason}" for reason in fit.reasons]
    lines += [f"          assumes {text}" for text in fit.assumptions]
    return lines + [f"          note: {text}" for text in fit.notes]


def inspect(path: str | os.PathLike[str], *, dialects: Sequence[str] = ()) -> InspectReport:
    """List what a checkpoint holds. The only values that are read are u and v of spectral norm, which may be averages.

    Args:
        path: a checkpoint of a whole network or of the layer alone.
        dialects: TOML files of your own, which are tried with the built-in dialects.

    Raises:
        PortError: if the file or one of the dialects cannot be read.
        ModuleNotFoundError: if the format's own library is not installed.

    Example:
        >>> import tempfile
        >>> from selfattn_core import SelfAttentionConfig, init_params, save
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = SelfAttentionConfig(16)
        ...     save(f"{folder}/a.safetensors", config, init_params(config, seed=0))
        ...     [fit.dialect for fit in inspect(f"{folder}/a.safetensors").blocks[0].fits if fit.verdict == "fits"]
        ['canonical']
    """
    with open_tensors(path) as tensors:
        blocks = _blocks(tensors, dialects)
        index = index_of(tensors)
        unknown = all(fit.verdict == "almost" for block in blocks for fit in block.fits)
        return InspectReport(
            str(path),
            tensors.format,
            dict(tensors.metadata),
            {key: (info.shape, info.dtype) for key, info in tensors.items()},
            sum(math.prod(info.shape) for info in tensors.values()),
            tuple(blocks),
            tensors.left_out,
            tuple(sorted(optimiser_keys(tensors))),
            ". ".join(filter(None, (of_several(tensors.path), averages_without_names(tensors)))),
            tuple(nearest(index)) if unknown else (),
            tuple(groups(index, tensors)) if unknown else (),
        )


def source_dialect(tensors: Tensors, name: str | None) -> Dialect:
    """The dialect of this name. Without a name, "canonical" for a canonical file, the only one that records its dialect.

    Raises:
        PortError: if the file is not canonical and there is no name. The message names the dialects that fit.
    """
    if name is not None:
        return dialect(name)
    if is_canonical(tensors):
        return dialect("canonical")
    fits, names = fitting(tensors)
    raise PortError(
        (
            f"{tensors.path}: choose its dialect with ",
            Remedy("dialect"),
            f": {fits}. Equal keys do not mean equal functions. Choose the dialect of the code that wrote the file.",
        ),
        kind="dialect_needed",
        names=names,
    )


def fitting(tensors: Tensors) -> tuple[str, list[str]]:
    """The dialects that fit the file, as words for a message and as names."""
    found = candidates(tensors)
    text = (
        f"its keys fit {named(found)}"
        if found
        else "its keys fit no dialect, and `selfattn inspect` shows why"
    )
    return text, list(found)


def candidates(tensors: Tensors) -> dict[str, Fit]:
    """The dialects that fit a block of the file, by name. Refused ones are last."""
    fits = [fit for block in _blocks(tensors, ()) for fit in block.fits if fit.verdict != "almost"]
    fits.sort(key=lambda fit: fit.verdict == "refused")
    return {fit.dialect: fit for fit in fits}


def named(fits: Mapping[str, Fit]) -> str:
    """The names of dialects. Refused ones are marked."""
    return ", ".join(f"{name}{' (refused)' * (fit.verdict == 'refused')}" for name, fit in fits.items())


def _blocks(tensors: Tensors, own: Sequence[str]) -> list[BlockFound]:
    index = index_of(tensors)
    places: dict[str, list[Fit]] = {}
    for name in dict.fromkeys((*own, *dialect_names())):
        chosen = dialect(name)
        for prefix in prefixes(chosen, index):
            places.setdefault(prefix, []).append(_fit(chosen, index, prefix, tensors))
    order = {"refused": 0, "fits": 1, "almost": 2}
    return [
        BlockFound(
            shown(prefix, index),
            len(index.under(prefix)),
            tuple(sorted(fits, key=lambda fit: order[fit.verdict])),
        )
        for prefix, fits in sorted(places.items())
    ]


def _fit(chosen: Dialect, index: KeyIndex, prefix: str, tensors: Tensors) -> Fit:
    found = match(chosen, index, prefix)
    planned = plan(found, tensors, settings_of(chosen, {}), stated(tensors, chosen))
    config = planned.config.to_dict() if planned.config else None
    reasons = [telltale.reason for telltale in found.telltales]
    if found.missing:
        reasons.append(f"missing: {listed(found.missing)}")
    if found.unused:
        reasons.append(f"unused: {listed(found.unused)}")
    # A gamma that the user must give is an assumption, not a misfit.
    given = [in_command(one.text) for one in planned.problems if one.kind == "gamma_not_stored"]
    reasons += [in_command(one.text) for one in planned.problems if one.kind != "gamma_not_stored"]
    name, title, variant = chosen.name, chosen.title, found.variant.name
    if reasons:
        if chosen.refused:
            reasons += [f"if it is this layer nevertheless: {chosen.reason}", f"instead: {chosen.instead}"]
        return Fit(name, title, "almost", variant, config, tuple(reasons))
    if chosen.refused:
        return Fit(
            name,
            title,
            "refused",
            variant,
            None,
            (chosen.reason, f"instead: {chosen.instead}"),
            (),
            chosen.caveats,
        )
    assumed = (*given, *map(str, planned.assumptions))
    notes = (*chosen.caveats, *map(in_command, state_notes(planned, tensors.read)))
    return Fit(name, title, "fits", variant, config, (), assumed, notes)
