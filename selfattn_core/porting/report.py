"""What a port did: every tensor's way, what was assumed, what was checked; as text, as JSON, and inside the target."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["BlockReport", "Check", "PortReport", "TensorReport", "listed"]


@dataclass(frozen=True)
class TensorReport:
    """One tensor of the target.

    Args:
        sources: keys of the source; none for a tensor that was made.
        source_shape: of the first of them.
        source_dtype: of the first of them.
        roles: canonical names that it passed through.
        steps: what was done, in order.
        target: its key.
        shape: as written.
        dtype: as written.
        sha256: of its bytes, in C order.
    """

    sources: tuple[str, ...]
    source_shape: tuple[int, ...]
    source_dtype: str
    roles: tuple[str, ...]
    steps: tuple[str, ...]
    target: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str


@dataclass(frozen=True)
class BlockReport:
    """One attention block.

    Args:
        prefix: before its keys in the source.
        block: its name in the target, "" for the only one.
        variant: of the source's dialect.
        config: the layer, as `SelfAttentionConfig.to_dict` gives it.
        tensors: of the target.
        assumptions: what the file does not show.
        notes: what else a person must know.
        ignored: keys under the prefix that say nothing about the function.
        unused: keys under the prefix that nothing reads.
    """

    prefix: str
    block: str
    variant: str
    config: dict[str, int | bool]
    tensors: tuple[TensorReport, ...]
    assumptions: tuple[str, ...]
    notes: tuple[str, ...]
    ignored: tuple[str, ...]
    unused: tuple[str, ...]


@dataclass(frozen=True)
class Check:
    """One verification.

    Args:
        name: what was verified.
        outcome: a check that was not asked for, or could not run, is listed as "not run".
        detail: numbers, or why not.
    """

    name: str
    outcome: Literal["passed", "failed", "not run"]
    detail: str


@dataclass(frozen=True)
class PortReport:
    """A port.

    Args:
        source: the file.
        source_format: its format.
        source_dialect: what it was read as.
        target: the file.
        target_format: its format.
        target_dialect: what it was written as.
        tensors_elsewhere: how many tensors of the source belong to no ported block.
        blocks: what was ported.
        checks: what was verified.
        written: whether the target is there now.
        optimiser_state: how many tensors of the source are an optimiser's state, which is not carried.
    """

    source: str
    source_format: str
    source_dialect: str
    target: str
    target_format: str
    target_dialect: str
    tensors_elsewhere: int
    blocks: tuple[BlockReport, ...]
    checks: tuple[Check, ...] = field(default=())
    written: bool = False
    optimiser_state: int = 0

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.outcome != "failed" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {"format": "selfattn port report", "version": 1, "passed": self.passed, **asdict(self)}

    def to_text(self) -> str:
        """All of it, for a person."""
        lines = [f"{self.source} ({self.source_format}) read as {self.source_dialect}"]
        for block in self.blocks:
            lines += _block_lines(block)
        if self.tensors_elsewhere:
            lines.append(f"{self.tensors_elsewhere} tensors of the source belong to no ported block.")
        if self.optimiser_state:
            lines.append(
                f"{self.optimiser_state} tensors of the source are an optimiser's state, and are not carried."
            )
        lines.append("checks")
        lines += [f"  {check.outcome:<7}  {check.name}: {check.detail}" for check in self.checks]
        state = "written" if self.written else "not written"
        lines.append(f"{self.target} ({self.target_format}) as {self.target_dialect}: {state}")
        return "\n".join(lines)


def _block_lines(block: BlockReport) -> list[str]:
    config = ", ".join(f"{name}={value}" for name, value in block.config.items())
    variant = f" ({block.variant})" if block.variant else ""
    lines = [f"block {block.prefix or 'at the top of the file'}{variant}: {config}"]
    for tensor in block.tensors:
        where = " + ".join(tensor.sources) or "made"
        shape = f" {tensor.source_shape} {tensor.source_dtype}" if tensor.sources else ""
        role = (
            ""
            if tensor.roles == (tensor.target,)
            else f" → {' and '.join(tensor.roles)}"
            if tensor.roles
            else ""
        )
        lines.append(
            f"  {where}{shape}{role} → {tensor.target} {tensor.shape} {tensor.dtype}  {tensor.sha256[:12]}"
        )
        if tensor.steps:
            lines.append(f"      {'; '.join(tensor.steps)}")
    lines += [f"  assumed: {text}" for text in block.assumptions]
    lines += [f"  note: {text}" for text in block.notes]
    if block.ignored:
        lines.append(f"  without meaning for the function: {listed(block.ignored)}")
    if block.unused:
        lines.append(f"  unused, as allowed: {listed(block.unused)}")
    return lines


def listed(names: Sequence[str], most: int = 8) -> str:
    """Some names, and how many more there are.

    Example:
        >>> listed(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
