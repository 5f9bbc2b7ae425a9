"""One block on its way: found in the source, in canonical form, and in the form of the target."""

from dataclasses import dataclass

from selfattn_core.config import SelfAttentionConfig
from selfattn_core.porting.blocks.find import Found
from selfattn_core.porting.dialects.dialect import Dialect
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats import Tensors
from selfattn_core.porting.report import BlockReport, TensorReport
from selfattn_core.porting.translation.from_dialect import Imported, import_block
from selfattn_core.porting.translation.to_dialect import Exported, export_block
from selfattn_core.problems import in_command

__all__ = ["Block", "translate"]


@dataclass(frozen=True)
class Block:
    """A block and what it becomes.

    Args:
        found: in the source.
        name: in the target, "" for the only one.
        imported: in canonical form.
        exported: in the dialect of the target.
    """

    found: Found
    name: str
    imported: Imported
    exported: Exported

    @property
    def config(self) -> SelfAttentionConfig:
        """The layer."""
        return self.imported.config

    @property
    def source_keys(self) -> frozenset[str]:
        """The keys of the source that the block was made of, or that say nothing about its function."""
        match = self.found.plan.match
        return frozenset((*match.used, *match.ignored))

    def report(self) -> BlockReport:
        """What was done to every tensor."""
        match = self.found.plan.match
        return BlockReport(
            self.found.prefix,
            self.name,
            match.variant.name,
            self.config.to_dict(),
            tuple(self._tensor(key) for key in self.exported.tensors),
            tuple(str(one) for one in self.found.plan.assumptions),
            (*match.dialect.caveats, *self.exported.notes, *map(in_command, self.imported.notes)),
            match.ignored,
            match.unused,
        )

    def _tensor(self, key: str) -> TensorReport:
        dtype, shape, sha256 = self.exported.tensors.mark(key)
        names = self.exported.made_of[key]
        came = [self.imported.origins[name] for name in names if name in self.imported.origins]
        sources = tuple(dict.fromkeys(source for origin in came for source in origin.sources))
        first = came[0] if came else None
        return TensorReport(
            sources,
            first.shape if first and sources else (),
            first.dtype if first and sources else "",
            names,
            (*(first.steps if first else ()), *self.exported.steps[key]),
            key,
            shape,
            str(dtype),
            sha256,
        )


def translate(
    found: Found,
    tensors: Tensors,
    to: Dialect,
    *,
    place: tuple[str, str],
    dtype: str | None,
    keep_spectral_norm: bool,
) -> Block:
    """A block of the source in the form of the target.

    Args:
        found: the block.
        tensors: of the source, which must stay open as long as the arrays of the block are needed.
        to: dialect of the target.
        place: the block's name in the target, and what is before its keys there.
        dtype: as in `port`.
        keep_spectral_norm: as in `port`.

    Raises:
        PortError: if its numbers cannot be ported, or the target's layer cannot be this one.
    """
    try:
        imported = import_block(found.plan, tensors.read, dtype=dtype, keep_spectral_norm=keep_spectral_norm)
    except PortError as error:
        block = f"block {found.prefix}: " if found.prefix else ""
        raise error.within(f"{tensors.path}: {block}") from error
    name, prefix = place
    return Block(found, name, imported, export_block(to, imported.config, imported.params, prefix=prefix))
