"""The report of a port, as text and as JSON: every change of every tensor, the assumptions and the checks."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["BlockReport", "Check", "PortReport", "TensorReport", "listed"]


@dataclass(frozen=True)
class TensorReport:
    """One tensor of the target.

    Args:
        sources: its keys in the source. Empty for a new tensor.
        source_shape: the shape of the first source.
        source_dtype: the dtype of the first source.
        roles: the canonical names whose values it contains.
        steps: every change, in order.
        target: its key in the target.
        shape: its shape in the target.
        dtype: its dtype in the target.
        sha256: the SHA-256 of its bytes, in C order.
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
        prefix: the beginning of its keys in the source.
        block: its name in the target. "" if it is the only block.
        variant: the variant of the source's dialect.
        config: the layer, from `SelfAttentionConfig.to_dict`.
        tensors: its tensors in the target.
        assumptions: facts that the file does not show.
        notes: other facts that a user must know.
        ignored: keys under the prefix that do not change the function.
        unused: keys under the prefix that the dialect does not read.
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
        name: what the check verifies.
        outcome: the result. "not run" means that nobody asked for the check, or that it could not run.
        detail: the numbers, or the reason why the check did not run.
    """

    name: str
    outcome: Literal["passed", "failed", "not run"]
    detail: str


@dataclass(frozen=True)
class PortReport:
    """A port.

    Args:
        source: the source's file.
        source_format: the source's format.
        source_dialect: the dialect that the source was read in.
        target: the target's file.
        target_format: the target's format.
        target_dialect: the dialect that the target was written in.
        tensors_elsewhere: the number of tensors of the source outside the ported blocks.
        blocks: the ported blocks.
        checks: the checks.
        written: whether the target was written.
        optimiser_state: the number of tensors of the source that are an optimiser's state. They are not ported.
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
        """The report as a dictionary that JSON can hold."""
        return {"format": "selfattn port report", "version": 1, "passed": self.passed, **asdict(self)}

    def to_text(self) -> str:
        """The report as text."""
        lines = [f"{self.source} ({self.source_format}) read as {self.source_dialect}"]
        for block in self.blocks:
            lines += _block_lines(block)
        if self.tensors_elsewhere:
            lines.append(f"{self.tensors_elsewhere} tensors of the source are outside the ported blocks.")
        if self.optimiser_state:
            lines.append(
                f"{self.optimiser_state} tensors of the source are an optimiser's state, which was not ported."
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
        where = " + ".join(tensor.sources) or "new"
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
        lines.append(f"  ignored, since they do not change the function: {listed(block.ignored)}")
    if block.unused:
        lines.append(f"  unused, as allowed: {listed(block.unused)}")
    return lines


def listed(names: Sequence[str], most: int = 8) -> str:
    """The first names of a list, and the number of the others.

    Example:
        >>> listed(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
