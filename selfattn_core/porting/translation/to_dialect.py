"""Writes a config and canonical parameters as the tensors of a dialect, if its layer can have that config."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.params import projections
from selfattn_core.porting.dialects.dialect import BatchNorm, Dialect, KernelForm, Variant
from selfattn_core.porting.dialects.kernel_axes import from_matrix
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.translation.folding import cast
from selfattn_core.porting.translation.lazy import MarkedArrays
from selfattn_core.problems import Problem

__all__ = ["Exported", "export_block", "separator"]


@dataclass(frozen=True)
class Exported:
    """A block in a dialect.

    Args:
        tensors: the tensors by key. Each is computed at every access.
        made_of: the canonical names that a tensor comes from, by key. Empty for a new tensor.
        steps: the changes, by key.
        notes: facts that a user must know.
        variant: the name of the variant, "" if there is only one.
        exact: whether every value is the layer's own. Their order may differ.
    """

    tensors: MarkedArrays
    made_of: Mapping[str, tuple[str, ...]]
    steps: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]
    variant: str
    exact: bool


def separator(dialect: Dialect) -> str:
    """The separator between the parts of a dialect's keys.

    Example:
        >>> from selfattn_core.porting.dialects.catalogue import dialect
        >>> separator(dialect("biggan")), separator(dialect("keras"))
        ('.', '/')
    """
    return "/" if any("/" in form.kernel for form in dialect.kernels) else "."


def export_block(
    dialect: Dialect, config: SelfAttentionConfig, params: Mapping[str, Array], *, prefix: str = ""
) -> Exported:
    """Write a block with the names and the layout of a dialect.

    Args:
        dialect: the dialect of the target.
        config: the layer.
        params: its arrays. Spectral norm is already folded, unless it is kept.
        prefix: the prefix of every key, with its separator.

    Raises:
        PortError: if the dialect's layer cannot be this one, with the reasons for every variant.

    Example:
        >>> from selfattn_core import init_params
        >>> from selfattn_core.porting.dialects.catalogue import dialect
        >>> config = SelfAttentionConfig(16)
        >>> exported = export_block(dialect("heykeetae"), config, init_params(config, seed=0), prefix="attn1.")
        >>> exported.tensors["attn1.query_conv.weight"].shape
        (2, 16, 1, 1)
    """
    dialect.check_expressible("written")
    reasons = {variant.name: _misfits(dialect, variant, config, params) for variant in dialect.variants}
    fitting = [variant for variant in dialect.variants if not reasons[variant.name]]
    if not fitting:
        raise PortError.of(
            f"{dialect.name} cannot hold {config}:\n  ",
            [
                Problem("not_expressible", f"{f'{name}: ' if name else ''}{'; '.join(why)}", (name,))
                for name, why in reasons.items()
            ],
        )
    variant = min(fitting, key=lambda candidate: candidate.batch_norm is not None)
    return _Exporter(dialect, variant, config, params, prefix).run()


def _misfits(
    dialect: Dialect, variant: Variant, config: SelfAttentionConfig, params: Mapping[str, Array]
) -> list[str]:
    """The reasons why a variant's layer cannot be this one."""
    found = []
    if variant.out_projection is not None and variant.out_projection != config.out_projection:
        found.append(f"it has {'an' if variant.out_projection else 'no'} out projection")
    if dialect.kv_pool_stored and variant.kv_pool != config.kv_pool:
        found.append(f"its kv_pool is {variant.kv_pool}")
    for name, width in dialect.widths(config.channels).items():
        if getattr(config, name) != width:
            found.append(f"its {name} is {width} for {config.channels} channels")
    for role in projections(config) if config.use_bias else ():
        lacks = variant.use_bias is False or role in variant.bias_free
        if lacks and params[f"{role}.bias"].any():
            found.append(f"it has no {role} bias, and this layer's is not zero")
    if not dialect.gamma_keys and not config.out_projection and config.kv_pool > 1:
        found.append(
            "it has no gamma. Without an out projection gamma would be folded into the value, and a negative factor does not "
            "commute with max pooling"
        )
    if _form(dialect, config) is None:
        stored = "u and v with sigma = uᵀWv" if config.spectral_norm else "a kernel without spectral norm"
        found.append(f"it has no place for {stored}")
    if config.spectral_norm and not _keeps_norm(dialect, variant, config):
        found.append(
            "spectral norm would cancel the factor that its scale, batch norm or missing gamma needs"
        )
    return found


def _keeps_norm(dialect: Dialect, variant: Variant, config: SelfAttentionConfig) -> bool:
    plain = dialect.scale_factor(config.channels, config.qk_channels) == 1
    return plain and variant.batch_norm is None and bool(dialect.gamma_keys)


def _form(dialect: Dialect, config: SelfAttentionConfig) -> KernelForm | None:
    """The form of the kernels in the target, None if there is none."""
    for form in dialect.kernels:
        rule = form.spectral_norm
        if config.spectral_norm and rule and rule.sigma == "stored":
            return form
        if not config.spectral_norm and rule is None and not form.requires:
            return form
    return None


class _Exporter:
    def __init__(
        self,
        dialect: Dialect,
        variant: Variant,
        config: SelfAttentionConfig,
        params: Mapping[str, Array],
        prefix: str,
    ) -> None:
        form = _form(dialect, config)
        if form is None:
            raise PortError(f"{dialect.name}: has no form for the kernels of {config}.")
        self.dialect, self.variant, self.config, self.params, self.prefix = (
            dialect,
            variant,
            config,
            params,
            prefix,
        )
        self.form = form
        self.dtype = params["gamma"].dtype
        self.makers: dict[str, Callable[[], Array]] = {}
        self.made_of: dict[str, tuple[str, ...]] = {}
        self.steps: dict[str, tuple[str, ...]] = {}
        self.exact = True

    def run(self) -> Exported:
        for role in projections(self.config):
            self._projection(role)
        if self.dialect.gamma_keys:
            self._put(self.dialect.gamma_keys[0], partial(self._as_it_is, "gamma"), ["gamma"], [])
        if self.variant.batch_norm:
            self._identity_norm(self.variant.batch_norm)
        tensors = MarkedArrays(self.makers)
        return Exported(tensors, self.made_of, self.steps, self._notes(), self.variant.name, self.exact)

    def _put(self, key: str, maker: Callable[[], Array], made_of: list[str], steps: list[str]) -> None:
        key = self.prefix + key
        self.makers[key] = maker
        self.made_of[key] = tuple(made_of)
        self.steps[key] = tuple(steps)

    def _as_it_is(self, name: str) -> Array:
        return self.params[name]

    def _constant(self, length: int, value: float) -> Array:
        return np.full(length, value, self.dtype)

    def _kernel(self, role: str, divisor: float, factor: float) -> Array:
        kernel = self.params[f"{role}.kernel"]
        if (divisor, factor) != (1.0, 1.0):
            kernel = cast(kernel, self.dtype, divisor=divisor, factor=factor)
        return kernel if self.form.axes == "IO" else from_matrix(kernel, self.form.axes)

    def _bias(self, role: str, divisor: float, factor: float) -> Array:
        return cast(self.params[f"{role}.bias"], self.dtype, divisor=divisor, factor=factor)

    def _projection(self, role: str) -> None:
        path, form = self.variant.roles[role], self.form
        divisor, factor, steps, gamma = 1.0, 1.0, [], []
        scale = self.dialect.scale_factor(self.config.channels, self.config.qk_channels)
        if role == "query" and scale != 1:
            divisor = scale
            self.exact = False
            steps.append(f"÷ {scale:.6g}, because the original multiplies the scores by it")
        if not self.dialect.gamma_keys and role == ("out" if self.config.out_projection else "value"):
            factor = float(self.params["gamma"][0]) / (self.dialect.gamma_value or 1.0)
            gamma = ["gamma"]
            self.exact = False
            steps.append(f"× gamma = {factor:.9g}")
        layout = [] if form.axes == "IO" else [f"(C_in, C_out) → {form.axes}"]
        names = [f"{role}.kernel", *gamma]
        self._put(
            form.kernel.replace("{path}", path),
            partial(self._kernel, role, divisor, factor),
            names,
            steps + layout,
        )
        if form.spectral_norm and self.config.spectral_norm:
            for part, pattern in (("u", form.spectral_norm.u), ("v", form.spectral_norm.v)):
                key, name = pattern.replace("{path}", path), f"{role}.{part}"
                self._put(key, partial(self._as_it_is, name), [name], [])
        if self.variant.use_bias is False or role in self.variant.bias_free:
            return
        key = form.bias.replace("{path}", path)
        if self.config.use_bias:
            self._put(key, partial(self._bias, role, divisor, factor), [f"{role}.bias", *gamma], list(steps))
        elif self.variant.use_bias:
            length = projections(self.config)[role][1]
            self._put(
                key, partial(self._constant, length, 0.0), [], ["zeros, because the layer has no biases"]
            )

    def _identity_norm(self, norm: BatchNorm) -> None:
        parts = {"weight": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0 - norm.eps}
        for part, value in parts.items():
            if key := getattr(norm, part):
                maker = partial(self._constant, self.config.channels, value)
                self._put(key, maker, [], ["a batch norm that changes nothing"])

    def _notes(self) -> tuple[str, ...]:
        found = []
        if self.dialect.spectral_norm_always and not self.config.spectral_norm:
            found.append(
                "the kernels are the effective ones. Remove spectral norm from the original layer before loading "
                "(torch.nn.utils.remove_spectral_norm), or it divides them again"
            )
        if not self.dialect.gamma_saved:
            gamma = float(self.params["gamma"][0])
            found.append(
                f"if gamma is a plain tensor of the layer, no state dict contains it: set it to {gamma:.9g} by hand"
            )
        if not self.dialect.kv_pool_stored and self.config.kv_pool > 1 and self.dialect.name != "canonical":
            found.append(f"the tensors do not show kv_pool = {self.config.kv_pool}: create the layer with it")
        return tuple(found)
