"""From a config and canonical parameters to the tensors of a dialect, wherever its layer can be that config."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfattn_core.config import SelfAttentionConfig
from selfattn_core.params import projections
from selfattn_core.porting.dialects.dialect import BatchNorm, Dialect, KernelForm, Variant
from selfattn_core.porting.dialects.kernel_axes import from_matrix
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.translation.folding import cast
from selfattn_core.porting.translation.lazy import MarkedArrays
from selfattn_core.problems import Problem

__all__ = ["Exported", "export_block", "separator"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Exported:
    """A block in a dialect.

    Args:
        tensors: by key, each made at every access.
        made_of: the canonical names that a tensor comes from; none for what is made.
        steps: what was done, by key.
        notes: what a person must know.
        variant: name of the variant, "" if there is one only.
        exact: whether every number is the layer's own, at most in another order.
    """

    tensors: MarkedArrays
    made_of: Mapping[str, tuple[str, ...]]
    steps: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]
    variant: str
    exact: bool


def separator(dialect: Dialect) -> str:
    """What a dialect puts between the parts of a key.

    Example:
        >>> from selfattn_core.porting.dialects.catalogue import dialect
        >>> separator(dialect("biggan")), separator(dialect("keras"))
        ('.', '/')
    """
    return "/" if any("/" in form.kernel for form in dialect.kernels) else "."


def export_block(
    dialect: Dialect, config: SelfAttentionConfig, params: Mapping[str, Array], *, prefix: str = ""
) -> Exported:
    """A block under the names and in the layout of a dialect.

    Args:
        dialect: of the target.
        config: the layer.
        params: its arrays, already without spectral norm unless that is to be kept.
        prefix: put before every key, with its separator.

    Raises:
        PortError: if the dialect's layer cannot be this one; says why, for every variant.

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
    """Why a variant's layer cannot be this one."""
    found = []
    if variant.out_projection is not None and variant.out_projection != config.out_projection:
        found.append(f"it has {'an' if variant.out_projection else 'no'} out projection")
    if dialect.kv_pool_stored and variant.kv_pool != config.kv_pool:
        found.append(f"its kv_pool is {variant.kv_pool}")
    for name, width in dialect.widths(config.channels).items():
        if getattr(config, name) != width:
            found.append(f"it makes {name} = {width} of {config.channels} channels")
    for role in projections(config) if config.use_bias else ():
        lacks = variant.use_bias is False or role in variant.bias_free
        if lacks and params[f"{role}.bias"].any():
            found.append(f"it has no bias of the {role}, and this one is not zero")
    if not dialect.gamma_keys and not config.out_projection and config.kv_pool > 1:
        found.append(
            "it has no gamma, and without an out projection gamma would go into the value, where max pooling does not "
            "let a negative factor pass"
        )
    if _form(dialect, config) is None:
        stored = (
            "u and v, of which sigma is uᵀWv" if config.spectral_norm else "a kernel without spectral norm"
        )
        found.append(f"it has no place for {stored}")
    if config.spectral_norm and not _keeps_norm(dialect, variant, config):
        found.append("spectral norm undoes the factor that its scale, batch norm or absent gamma asks for")
    return found


def _keeps_norm(dialect: Dialect, variant: Variant, config: SelfAttentionConfig) -> bool:
    plain = dialect.scale_factor(config.channels, config.qk_channels) == 1
    return plain and variant.batch_norm is None and bool(dialect.gamma_keys)


def _form(dialect: Dialect, config: SelfAttentionConfig) -> KernelForm | None:
    """The form that a kernel is written in."""
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
            raise PortError(f"{dialect.name}: has no place for the kernels of {config}.")
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
            steps.append(f"÷ {scale:.6g}, which the original multiplies the scores by")
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
            self._put(key, partial(self._constant, length, 0.0), [], ["zeros, the layer has no biases"])

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
                "the kernels are those that act; the original divides by a spectral norm, so take that off its layer before "
                "loading (torch.nn.utils.remove_spectral_norm)"
            )
        if not self.dialect.gamma_saved:
            gamma = float(self.params["gamma"][0])
            found.append(
                f"where gamma is a plain tensor, it is in no state dict: set it to {gamma:.9g} by hand"
            )
        if not self.dialect.kv_pool_stored and self.config.kv_pool > 1 and self.dialect.name != "canonical":
            found.append(f"the tensors do not say kv_pool = {self.config.kv_pool}: make the layer with it")
        return tuple(found)
