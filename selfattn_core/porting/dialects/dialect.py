"""A dialect: what a published implementation calls its tensors, and what it computes with them. `parse` describes its file."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from selfattn_core.porting.errors import PortError

__all__ = [
    "POWER",
    "ROLES",
    "WIDTH",
    "BatchNorm",
    "Dialect",
    "KernelForm",
    "SpectralNorm",
    "Telltale",
    "Variant",
]

ROLES = ("query", "key", "value", "out")
WIDTH = re.compile(r"channels(?://([1-9]\d*))?")
"""What a rule for a width looks like."""
POWER = re.compile(r"(channels|qk_channels)\^(-?\d+(?:\.\d+)?)")
"""What a rule for the scale looks like, unless it is a number."""


@dataclass(frozen=True)
class SpectralNorm:
    """How the original makes sigma from what it stores; its kernel acts divided by sigma.

    Args:
        u: pattern of the key of the stored vector.
        v: pattern of the other one, "" if it is not used.
        sigma: "stored" or "iterate".
        side: the axis of the kernel that u belongs to, "out", "in" or, by u's own shape, "shape".
        normalize: "max", "add", "root-max" or "root-add", the rule that keeps a division by zero away.
        eps: of that rule.
        iterations: power iterations from the stored u.
    """

    u: str
    v: str
    sigma: str
    side: str
    normalize: str
    eps: float
    iterations: int


@dataclass(frozen=True)
class KernelForm:
    """One way in which a projection is stored."""

    kernel: str
    bias: str
    axes: str
    requires: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    spectral_norm: SpectralNorm | None = None


@dataclass(frozen=True)
class BatchNorm:
    """Keys of a batch norm over the output of the last projection; weight and bias may be ""."""

    weight: str
    bias: str
    mean: str
    var: str
    eps: float


@dataclass(frozen=True)
class Variant:
    """One set of keys of a dialect; None in a switch means what the file shows."""

    name: str
    roles: Mapping[str, str]
    out_projection: bool | None
    use_bias: bool | None
    bias_free: tuple[str, ...]
    kv_pool: int
    batch_norm: BatchNorm | None


@dataclass(frozen=True)
class Telltale:
    """A key whose presence, or absence, shows that the file belongs to another function."""

    key: str
    missing: bool
    reason: str
    beside: str = ""


@dataclass(frozen=True)
class Dialect:
    """One implementation, as the docstring of `parse` describes; `text` is the file it comes from."""

    name: str
    title: str
    source: str
    layout: str
    prefixes: tuple[str, ...]
    caveats: tuple[str, ...]
    ignore: tuple[str, ...]
    requires: tuple[str, ...]
    spectral_norm_always: bool
    variants: tuple[Variant, ...]
    kernels: tuple[KernelForm, ...]
    gamma_keys: tuple[str, ...]
    gamma_value: float | None
    gamma_saved: bool
    scale: str | float
    scale_setting: str
    kv_pool_stored: bool
    qk_channels: str
    value_channels: str
    widths_required: bool
    ema: tuple[str, ...]
    ema_first: bool
    telltales: tuple[Telltale, ...]
    reason: str
    instead: str
    text: str

    @property
    def refused(self) -> bool:
        """Whether the layer is known and cannot be expressed."""
        return bool(self.reason)

    def check_expressible(self, done: str, *, where: str = "") -> None:
        """Refuse a dialect whose layer cannot be expressed.

        Args:
            done: what cannot be done with it, for example "written".
            where: the file or layer that it is about, with a colon.

        Raises:
            PortError: with the reason, and what to do instead.
        """
        if self.refused:
            raise PortError(
                f"{where}{self.name} ({self.title}) cannot be {done}: {self.reason}. Instead: {self.instead}.",
                kind="dialect_refused",
                names=[self.name],
            )

    def scale_factor(self, channels: int, qk_channels: int) -> float:
        """What the scores are multiplied by in a layer of these widths.

        Example:
            >>> from selfattn_core.porting.dialects.catalogue import dialect
            >>> dialect("timm").scale_factor(64, 8)
            0.125
        """
        if not isinstance(self.scale, str):
            return self.scale
        base, exponent = POWER.fullmatch(self.scale).groups()  # type: ignore[union-attr]
        return float({"channels": channels, "qk_channels": qk_channels}[base] ** float(exponent))

    def widths(self, channels: int) -> dict[str, int]:
        """The widths that the original makes for a map of so many channels, where it has no choice.

        Example:
            >>> from selfattn_core.porting.dialects.catalogue import dialect
            >>> dialect("biggan").widths(64)
            {'qk_channels': 8, 'value_channels': 32}
        """
        found = {}
        for name, rule in (("qk_channels", self.qk_channels), ("value_channels", self.value_channels)):
            if rule:
                found[name] = channels // int(WIDTH.fullmatch(rule).group(1) or 1)  # type: ignore[union-attr]
        return found
