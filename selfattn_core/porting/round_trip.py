"""Compares a target with what was read back from a trial folder, bit for bit, before the target is written."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from selfattn_core import spec
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.porting.blocks.bystanders import optimiser_keys
from selfattn_core.porting.blocks.find import index_of
from selfattn_core.porting.blocks.keys import normal
from selfattn_core.porting.blocks.match import match
from selfattn_core.porting.blocks.plan import plan
from selfattn_core.porting.dialects.dialect import Dialect
from selfattn_core.porting.dialects.settings import settings_of
from selfattn_core.porting.formats import Tensors
from selfattn_core.porting.report import Check
from selfattn_core.porting.translation.block import Block
from selfattn_core.porting.translation.from_dialect import Imported, import_block
from selfattn_core.porting.translation.lazy import mark
from selfattn_core.porting.verify import check_output

__all__ = ["compare_blocks", "compare_whole"]

NAME = "round trip"


def compare_blocks(blocks: Sequence[Block], to: Dialect, written: Tensors) -> list[Check]:
    """Check a file of blocks: the tensors must be the same, and for the target's dialect the layers too.

    Args:
        blocks: the blocks that were written.
        to: the dialect of the target.
        written: the tensors that were read back.
    """
    wrong = _changed(blocks, written)
    held = sum(len(block.exported.tensors) for block in blocks)
    if wrong or len(written) != held:
        text = f"{len(wrong)} of {held} tensors changed: {', '.join(wrong)}"
        return [Check(NAME, "failed", text)]
    return [
        Check(NAME, "passed", f"{held} tensors written, read back and compared bit for bit"),
        *(_check_reimport(block, to, written) for block in blocks),
    ]


def compare_whole(blocks: Sequence[Block], to: Dialect, written: Tensors, source: Tensors) -> list[Check]:
    """Check a whole checkpoint: the blocks must be the written ones, and everything else must be unchanged.

    Args:
        blocks: the blocks that were written in another form.
        to: the dialect of the target.
        written: the tensors that were read back.
        source: the tensors of the whole source. An optimiser's state is left out of the target.
    """
    new = [key for block in blocks for key in block.exported.tensors]
    gone = {key for block in blocks for key in block.source_keys} | optimiser_keys(source)
    others = [key for key in source if key not in gone]
    changed = [
        key
        for key in others
        if key not in written
        or written[key] != source[key]
        or mark(written.read(key)) != mark(source.read(key))
    ]
    known = {*new, *others}
    wrong = [*_changed(blocks, written), *changed, *(key for key in written if key not in known)]
    if wrong:
        return [Check(NAME, "failed", f"changed: {', '.join(wrong[:20])}")]
    return [
        Check(NAME, "passed", f"{len(new)} tensors written, read back and compared bit for bit"),
        Check("everything else", "passed", f"{len(others)} tensors are equal to the source's, bit for bit"),
        *(_check_reimport(block, to, written) for block in blocks),
    ]


def _changed(blocks: Sequence[Block], written: Tensors) -> list[str]:
    return [
        key
        for block in blocks
        for key in block.exported.tensors
        if key not in written or mark(written.read(key)) != block.exported.tensors.mark(key)
    ]


def _check_reimport(block: Block, to: Dialect, written: Tensors) -> Check:
    """Check that the target's dialect reads the same layer from the target."""
    name = f"read back as {to.name}{f', {block.name}' if block.name else ''}"
    given: dict[str, str | bool | float] = {}
    if not to.kv_pool_stored:
        given["kv_pool"] = block.config.kv_pool
    if not to.gamma_saved and not to.gamma_keys:
        given["gamma"] = float(block.imported.params["gamma"][0])
    settings = settings_of(to, given)
    prefix = f"{normal(block.name)}/" if block.name else ""
    planned = plan(match(to, index_of(written), prefix, averaged=settings.ema), written, settings)
    if planned.problems or planned.match.missing:
        reasons = (*map(str, planned.problems), *planned.match.missing)
        return Check(name, "failed", "; ".join(reasons))
    again = import_block(planned, written.read, keep_spectral_norm=block.config.spectral_norm)
    if planned.match.unused or block.exported.exact:
        return Check(name, *_comparison(block, again))
    x = np.random.Generator(np.random.PCG64(1)).standard_normal(
        (2, 2 * block.config.kv_pool + 1, 3 * block.config.kv_pool + 1, block.config.channels)
    )
    wide = {key: array.astype(np.float64) for key, array in again.params.items()}
    y = spec.forward(again.config, wide, x)
    return check_output(name, block.config, block.imported.params, x, y)


def _comparison(block: Block, again: Imported) -> tuple[Literal["passed", "failed"], str]:
    """Compare the layer that was read back, bit for bit. Zero biases that one side lacks do not change the function."""
    there, here = again.origins, block.imported.origins
    if _without_biases(again.config) != _without_biases(block.config):
        return "failed", f"it is another layer: {again.config}"
    wrong = [name for name in there if name in here and there[name].sha256 != here[name].sha256]
    made = [name for name in there if name not in here]
    gone = [name for name in here if name not in there]
    wrong += [name for name in made if again.params[name].any()]
    wrong += [name for name in gone if block.imported.params[name].any()]
    if wrong:
        return "failed", f"these tensors differ: {', '.join(wrong)}"
    detail = "the same config and bits"
    if made or gone:
        detail = f"the same bits; {', '.join(made or gone)} {'are new zeros' if made else 'were zeros and are left out'}"
    return "passed", detail


def _without_biases(config: SelfAttentionConfig) -> SelfAttentionConfig:
    return replace(config, use_bias=False)
