"""A dialect as data: how an implementation names, stores and uses its tensors. `parse` describes the file."""

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
"""The pattern of a rule for a width."""
POWER = re.compile(r"(channels|qk_channels)\^(-?\d+(?:\.\d+)?)")
"""The pattern of a rule for the scale, unless it is a number."""


@dataclass(frozen=True)
class SpectralNorm:
    """How the original computes sigma. It divides its kernel by sigma.

    Args:
        u: the pattern of the key of the stored vector u.
        v: the pattern of the key of v, "" if the original does not use it.
        sigma: "stored" or "iterate".
        side: the axis of the kernel that u belongs to: "out", "in", or "shape" if u's own shape shows it.
        normalize: "max", "add", "root-max" or "root-add", the rule that prevents a division by zero.
        eps: the eps of that rule.
        iterations: the number of power iterations from the stored u.
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
    """One way to store a projection."""

    kernel: str
    bias: str
    axes: str
    requires: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    spectral_norm: SpectralNorm | None = None


@dataclass(frozen=True)
class BatchNorm:
    """The keys of a batch norm over the output of the last projection. Weight and bias may be ""."""

    weight: str
    bias: str
    mean: str
    var: str
    eps: float


@dataclass(frozen=True)
class Variant:
    """One set of keys of a dialect. If a switch is None, the file shows it."""

    name: str
    roles: Mapping[str, str]
    out_projection: bool | None
    use_bias: bool | None
    bias_free: tuple[str, ...]
    kv_pool: int
    batch_norm: BatchNorm | None


@dataclass(frozen=True)
class Telltale:
    """A key whose presence or absence shows that the file belongs to another function."""

    key: str
    missing: bool
    reason: str
    beside: str = ""


@dataclass(frozen=True)
class Dialect:
    """One implementation. The docstring of `parse` describes the fields, and `text` is the content of the file."""

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
        """Whether the layer is one that this library cannot express."""
        return bool(self.reason)

    def check_expressible(self, done: str, *, where: str = "") -> None:
        """Refuse a dialect whose layer cannot be expressed.

        Args:
            done: the refused action as a participle, for example "written".
            where: the file or layer, with a colon.

        Raises:
            PortError: with the reason and with what to do instead.
        """
        if self.refused:
            raise PortError(
                f"{where}{self.name} ({self.title}) cannot be {done}: {self.reason}. Instead: {self.instead}.",
                kind="dialect_refused",
                names=[self.name],
            )

    def scale_factor(self, channels: int, qk_channels: int) -> float:
        """The factor of the scores in a layer of these widths.

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
        """The widths that the original always has for a feature map of this number of channels.

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
