"""Finds the blocks of a file that a dialect describes, or raises one error with every problem."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from selfattn_core.porting.blocks.bystanders import optimiser_keys
from selfattn_core.porting.blocks.keys import KeyIndex, normal
from selfattn_core.porting.blocks.match import Match, match, prefixes
from selfattn_core.porting.blocks.metadata import stated
from selfattn_core.porting.blocks.plan import Plan, plan
from selfattn_core.porting.dialects.dialect import Dialect
from selfattn_core.porting.dialects.settings import Settings
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats import Tensors
from selfattn_core.porting.formats.sharded import of_several
from selfattn_core.porting.report import listed
from selfattn_core.problems import Problem, Remedy

__all__ = ["Found", "find_blocks", "index_of", "shown"]


@dataclass(frozen=True)
class Found:
    """A block of a file, and the plan of its port."""

    prefix: str
    plan: Plan


def index_of(tensors: Tensors) -> KeyIndex:
    """The keys of a file, without those of an optimiser's state.

    Raises:
        PortError: if two keys differ only in their separators.
    """
    passed_over = optimiser_keys(tensors)
    index = KeyIndex(key for key in tensors if key not in passed_over)
    if index.clashes:
        pairs = "; ".join(f"{one} and {other}" for one, other in index.clashes[:8])
        names = [name for pair in index.clashes for name in pair]
        raise PortError(
            f"{tensors.path}: keys that differ only in their separators: {pairs}.",
            kind="keys_alike",
            names=names,
        )
    return index


def shown(prefix: str, index: KeyIndex) -> str:
    """A prefix with the separators of the file."""
    first = next(iter(index.under(prefix)), "")
    return index.original(prefix + first)[: len(prefix)] if first else prefix


def find_blocks(
    tensors: Tensors,
    dialect: Dialect,
    settings: Settings,
    *,
    prefix: Sequence[str] | None = None,
    strict: bool = True,
) -> list[Found]:
    """Find the blocks to port.

    Args:
        tensors: the tensors of the file.
        dialect: the dialect that the file is read in.
        settings: the settings of the dialect.
        prefix: the prefixes of the blocks, with * for any text. None for the only block.
        strict: whether an unused key under a block's prefix is an error.

    Raises:
        PortError: with every problem, if the dialect is refused, no block or several blocks fit, or keys are missing, unused
            or have a wrong shape.
    """
    dialect.check_expressible("ported", where=f"{tensors.path}: ")
    index = index_of(tensors)
    said = stated(tensors, dialect)
    if said.configs and "" in said.configs and prefix is None:
        prefix = [""]
    there = prefixes(dialect, index)
    chosen = _chosen(tensors, dialect, index, there, prefix)
    problems: list[Problem] = []
    found = []
    for one in chosen:
        matched = match(dialect, index, one, averaged=settings.ema)
        reasons = _mismatch(matched, strict=strict)
        if not reasons:
            planned = plan(matched, tensors, settings, said)
            reasons = list(planned.problems)
            found.append(Found(shown(one, index), planned))
        where = f"block {shown(one, index)!r}: " if one else ""
        problems += [reason.within(where) for reason in reasons]
    if problems:
        left_out = list(tensors.left_out.items())[:20]
        problems += [Problem("unusable", f"left out: {reason}", (key,)) for key, reason in left_out]
        if part := of_several(tensors.path):
            problems.append(Problem("split", part))
        raise PortError.of(
            f"{tensors.path}: does not fit {dialect.name} ({dialect.title}). `selfattn inspect` lists the dialects that fit.\n  ",
            problems,
        )
    return found


def _chosen(
    tensors: Tensors, dialect: Dialect, index: KeyIndex, there: list[str], prefix: Sequence[str] | None
) -> list[str]:
    known = [shown(one, index).rstrip("./") or "''" for one in there]
    if prefix is None:
        if len(there) > 1:
            raise PortError(
                (
                    f"{tensors.path}: holds {len(there)} blocks that look like {dialect.name}: {listed(known, 20)}. ",
                    "Choose with ",
                    Remedy("prefix"),
                    ", which accepts several prefixes and *.",
                ),
                kind="several_blocks",
                names=known,
            )
        return there or [_nearest(tensors, dialect, index)]
    chosen: list[str] = []
    for wanted in prefix:
        name = f"{normal(wanted)}/" if normal(wanted) else ""
        some = (
            [one for one in there if fnmatchcase(one.rstrip("/"), name.rstrip("/"))]
            if "*" in name
            else [name]
        )
        if not some or (some == [name] and not index.under(name)):
            if any(normal(key).startswith(name) for key in optimiser_keys(tensors)):
                raise PortError(
                    f"{tensors.path}: {wanted!r} is the state of an optimiser, which has a layer's keys but not its weights. "
                    f"Name the layer's own weights{f': {listed(known, 20)}' if known else ''}.",
                    kind="optimiser_state",
                    names=[wanted],
                )
            blocks = f"It has {listed(known, 20)}" if known else "It has no such block"
            raise PortError(
                f"{tensors.path}: has no block {wanted!r} that looks like {dialect.name}. {blocks}.",
                kind="no_block",
                names=[wanted],
            )
        chosen += [one for one in some if one not in chosen]
    return chosen


def _nearest(tensors: Tensors, dialect: Dialect, index: KeyIndex) -> str:
    """The prefix with the most keys of a dialect, for the message. At least one key of a role must be in the file."""
    places: dict[str, None] = {}
    for variant in dialect.variants:
        for path in variant.roles.values():
            for form in dialect.kernels:
                for ending in ("", *dialect.ema):
                    places |= dict.fromkeys(
                        index.prefixes_of(normal(form.kernel.replace("{path}", path) + ending))
                    )
    matches = [match(dialect, index, place) for place in places]
    if matches:
        return min(matches, key=lambda found: (len(found.missing), len(found.unused))).prefix
    variant, form = dialect.variants[0], dialect.kernels[0]
    wanted = [form.kernel.replace("{path}", path) for path in variant.roles.values()]
    left_out = f", and {listed(list(tensors.left_out), 6)} without numbers" if tensors.left_out else ""
    alone = of_several(tensors.path)
    raise PortError(
        f"{tensors.path}: has no block that looks like {dialect.name} ({dialect.title}). Expected keys that end with "
        f"{', '.join(wanted)}. It holds {listed(list(tensors), 6)}{left_out}. {f'{alone}. ' * bool(alone)}`selfattn inspect` lists the dialects that fit.",
        kind="no_block",
        names=wanted,
    )


def _mismatch(found: Match, *, strict: bool) -> list[Problem]:
    reasons = [Problem("other_function", telltale.reason, (telltale.key,)) for telltale in found.telltales]
    reasons += [Problem("missing", f"missing: {name}", (name,)) for name in found.missing]
    if found.ambiguous:
        text = f"the variants {found.variant.name} and {', '.join(found.ambiguous)} fit equally well, so the dialect is ambiguous"
        reasons.append(Problem("ambiguous", text, (found.variant.name, *found.ambiguous)))
    if strict and found.unused:
        said = (
            f"unused: {listed(found.unused, 20)}. An unused tensor may change what the layer computes. ",
            "If it does not, pass ",
            Remedy("strict", value=False),
        )
        reasons.append(Problem("unused", said, found.unused))
    return reasons
