"""Translates one block from the source's dialect to the target's, through the canonical form."""

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
    """One block in three forms.

    Args:
        found: the block in the source.
        name: its name in the target, "" if it is the only block.
        imported: the block in canonical form.
        exported: the block in the dialect of the target.
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
        """The keys of the source that the block comes from, or that do not change its function."""
        match = self.found.plan.match
        return frozenset((*match.used, *match.ignored))

    def report(self) -> BlockReport:
        """The report on every tensor."""
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
    """Translate a block of the source into the form of the target.

    Args:
        found: the block.
        tensors: the tensors of the source, which must stay open while the arrays of the block are used.
        to: the dialect of the target.
        place: the block's name and prefix in the target.
        dtype: as in `port`.
        keep_spectral_norm: as in `port`.

    Raises:
        PortError: if its values cannot be ported, or if the target's dialect cannot express the layer.
    """
    try:
        imported = import_block(found.plan, tensors.read, dtype=dtype, keep_spectral_norm=keep_spectral_norm)
    except PortError as error:
        block = f"block {found.prefix}: " if found.prefix else ""
        raise error.within(f"{tensors.path}: {block}") from error
    name, prefix = place
    return Block(found, name, imported, export_block(to, imported.config, imported.params, prefix=prefix))
