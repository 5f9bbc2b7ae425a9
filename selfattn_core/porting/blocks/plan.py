"""Plans the port of a block from its keys and shapes, the settings and the metadata of the file, without reading a tensor."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from selfattn_core.config import SelfAttentionConfig
from selfattn_core.porting.blocks.match import Match, Projection
from selfattn_core.porting.blocks.metadata import Stated
from selfattn_core.porting.dialects.kernel_axes import matrix_shape
from selfattn_core.porting.dialects.settings import Assumption, Settings
from selfattn_core.problems import Kind, Problem, Remedy, Text

__all__ = ["Listed", "Plan", "plan"]


class Listed(Protocol):
    """The facts about a tensor that is not read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The stored shape."""

    @property
    def dtype(self) -> str:
        """The stored dtype, as numpy or ml_dtypes names it."""


@dataclass(frozen=True)
class Plan:
    """The plan of a block's port, from keys and shapes only.

    Args:
        match: the keys that the dialect found.
        config: the layer. None if the shapes do not determine one.
        scale: the factor of the scores.
        settings: the settings of the dialect.
        assumptions: facts that the file does not show.
        problems: the reasons why the block cannot be ported.
        dtype: the dtype of the source, widened to a dtype of numpy.
    """

    match: Match
    config: SelfAttentionConfig | None
    scale: float
    settings: Settings
    assumptions: tuple[Assumption, ...]
    problems: tuple[Problem, ...]
    dtype: str


def plan(match: Match, infos: Mapping[str, Listed], settings: Settings, stated: Stated | None = None) -> Plan:
    """Plan the port of a block, without reading a tensor.

    Args:
        match: a match with all keys.
        infos: shapes and dtypes by key.
        settings: the settings of the dialect.
        stated: the file's own record of its layers. It determines what the tensors do not show. A setting or tensor that
            contradicts it is a problem.
    """
    return _Planner(match, infos, settings, stated or Stated()).plan()


class _Planner:
    def __init__(self, match: Match, infos: Mapping[str, Listed], settings: Settings, stated: Stated) -> None:
        self.match = match
        self.infos = infos
        self.settings = settings
        self.problems: list[Problem] = []
        self.assumptions: list[Assumption] = []
        self.own: SelfAttentionConfig | None = None
        self.pool_stated = False
        self._take(stated)

    def plan(self) -> Plan:
        match, dialect, variant = self.match, self.match.dialect, self.match.variant
        shapes = {role: self._kernel(found) for role, found in match.projections.items()}
        config = None
        scale = 1.0
        if all(shapes.values()) and len(shapes) >= 3:
            config = self._config({role: shape for role, shape in shapes.items() if shape})
        if config:
            self._vectors(config)
            self._widths(config)
            if self.settings.use_scale:
                scale = dialect.scale_factor(config.channels, config.qk_channels)
            self._compare(config)
        self._gamma()
        for key in self._read_keys():
            if not _is_float(self.infos[key].dtype):
                self._problem("dtype", f"{key} is {self.infos[key].dtype}, should be floating point", key)
        self._assume(self.settings.kv_pool or variant.kv_pool, scale)
        return Plan(
            match,
            config,
            scale,
            self.settings,
            tuple(self.assumptions),
            tuple(self.problems),
            self._dtype(),
        )

    def _problem(self, kind: Kind, text: Text, *names: str) -> None:
        self.problems.append(Problem(kind, text, names))

    def _take(self, stated: Stated) -> None:
        """Put the file's record of this block into the settings."""
        block = self.match.prefix.rstrip("/")
        pool = stated.pools.get(block)
        if stated.configs is not None:
            self.own = stated.configs.get(block)
            if self.own is None:
                self._problem("contradiction", f"the metadata has no config of block {block!r}", block)
                return
            pool = self.own.kv_pool
        if pool is None:
            return
        if self.settings.kv_pool not in (None, pool):
            given = Remedy("settings", self.settings.kv_pool, setting="kv_pool")
            text = (f"its metadata says kv_pool = {pool}, so ", given, " would contradict it")
            self._problem("contradiction", text, "kv_pool")
        self.pool_stated = True
        plain = self.own is not None and not self.own.spectral_norm
        self.settings = replace(self.settings, kv_pool=pool, plain=plain)

    def _compare(self, shapes: SelfAttentionConfig) -> None:
        """Compare the tensors of a canonical file with the config of its metadata."""
        if self.own is None:
            return
        if replace(shapes, spectral_norm=self.own.spectral_norm) != self.own:
            self._problem("contradiction", f"its tensors are {shapes}, but its metadata says {self.own}")
        norms = {found.form.spectral_norm is not None for found in self.match.projections.values()}
        if norms != {self.own.spectral_norm}:
            self._problem(
                "contradiction",
                f"its metadata says spectral_norm = {self.own.spectral_norm}, but its tensors u and v do not fit that",
            )

    def _kernel(self, found: Projection) -> tuple[int, int] | None:
        axes = found.form.axes
        shape = self.infos[found.kernel].shape
        matrix = matrix_shape(shape, axes)
        if matrix is None:
            text = f"{found.kernel} has shape {shape}; expected a 1×1 kernel with the axes {axes}"
            self._problem("shape", text, found.kernel)
        return matrix

    def _config(self, shapes: Mapping[str, tuple[int, int]]) -> SelfAttentionConfig | None:
        channels, qk_channels = shapes["query"]
        value_channels = shapes["value"][1]
        wanted = {
            "query": (channels, qk_channels),
            "key": (channels, qk_channels),
            "value": (channels, value_channels),
        }
        if "out" in shapes:
            wanted["out"] = (value_channels, channels)
        before = len(self.problems)
        for role, shape in shapes.items():
            if shape != wanted[role]:
                key = self.match.projections[role].kernel
                self._problem(
                    "shape",
                    f"{key}, the {role}, goes from {shape[0]} to {shape[1]} channels; expected {wanted[role][0]} to {wanted[role][1]}",
                    key,
                )
        if "out" not in shapes and value_channels != channels:
            key = self.match.projections["value"].kernel
            self._problem(
                "shape",
                f"{key}, the value, has {value_channels} channels, but the feature map has {channels}. Without an out projection "
                "the layer adds the two, so both need the same number",
                key,
            )
        if len(self.problems) > before or min(channels, qk_channels, value_channels) < 1:
            return None
        biases = [found.bias for found in self.match.projections.values()]
        pool = self.settings.kv_pool or self.match.variant.kv_pool
        return SelfAttentionConfig(
            channels,
            qk_channels,
            value_channels,
            out_projection="out" in shapes,
            use_bias=any(biases) or bool(self.match.batch_norm),
            kv_pool=pool,
        )

    def _vectors(self, config: SelfAttentionConfig) -> None:
        """Check the sizes of the biases and of the batch norm."""
        outputs = {
            "query": config.qk_channels,
            "key": config.qk_channels,
            "value": config.value_channels,
            "out": config.channels,
        }
        wanted = {found.bias: outputs[role] for role, found in self.match.projections.items() if found.bias}
        wanted |= dict.fromkeys(self.match.batch_norm.values(), config.channels)
        for key, length in wanted.items():
            shape = self.infos[key].shape
            if shape != (length,):
                self._problem("shape", f"{key} has shape {shape}; expected ({length},)", key)

    def _widths(self, config: SelfAttentionConfig) -> None:
        dialect = self.match.dialect
        for name, width in dialect.widths(config.channels).items():
            found = getattr(config, name)
            if found == width:
                continue
            if dialect.widths_required:
                self._problem(
                    "widths",
                    f"{name} is {found}, but {dialect.name} uses {width} for {config.channels} channels, so another "
                    "implementation with the same keys wrote it; `selfattn inspect` lists the dialects that fit",
                    name,
                )
            else:
                self.assumptions.append(
                    Assumption(
                        "",
                        f"{name} is {found}, but the original uses {width} for {config.channels} channels: "
                        "a changed copy wrote the file, and its function is assumed to be the same",
                    )
                )

    def _gamma(self) -> None:
        dialect, key = self.match.dialect, self.match.gamma
        if key:
            shape = self.infos[key].shape
            if int(np.prod(shape)) != 1:
                self._problem(
                    "shape",
                    f"{key} has shape {shape}; expected one element, the gain of the whole residual. A gain per sample "
                    "(as in heykeetae before 8 June 2018) or per channel cannot be expressed",
                    key,
                )
            if self.settings.gamma is not None:
                given = Remedy("settings", f"{self.settings.gamma:g}", setting="gamma")
                self._problem(
                    "contradiction", (f"{key} is in the file, so ", given, " would contradict it"), key
                )
        elif dialect.gamma_value is None and self.settings.gamma is None:
            text = (
                "gamma is not in the file. Pass its value with ",
                Remedy("settings", setting="gamma"),
                " (a plain tensor that is not a parameter was not trained. It still has its initial value, 0 in the ",
                "published layers, and then the layer is the identity)",
            )
            self._problem("gamma_not_stored", text)

    def _assume(self, kv_pool: int, scale: float) -> None:
        dialect, match, settings = self.match.dialect, self.match, self.settings
        add = self.assumptions.append
        if not dialect.kv_pool_stored and not self.pool_stated:
            add(Assumption("kv_pool", f"kv_pool = {kv_pool}"))
        if dialect.scale_setting:
            shown = "true" if settings.use_scale else "false"
            add(
                Assumption(
                    dialect.scale_setting,
                    f"{dialect.scale_setting} = {shown}: the scores are multiplied by {scale:.6g}",
                )
            )
        if settings.gamma is not None:
            add(Assumption("gamma", f"gamma = {settings.gamma:g}, from the settings"))
        elif dialect.gamma_value is not None:
            add(
                Assumption(
                    "", f"the original has no gamma and behaves as with gamma = {dialect.gamma_value:g}"
                )
            )
        rules = {found.form.spectral_norm for found in match.projections.values()}
        for rule in sorted((r for r in rules if r and r.sigma == "iterate"), key=repr):
            eps = rule.eps if settings.sn_eps is None else settings.sn_eps
            add(Assumption("sn_eps", f"sn_eps = {eps:g}, of the power iteration"))
        if match.variant.batch_norm:
            eps = match.variant.batch_norm.eps if settings.bn_eps is None else settings.bn_eps
            add(Assumption("bn_eps", f"bn_eps = {eps:g}, of the batch norm"))
        if dialect.ema_first or match.averages:
            which = "averaged" if match.averaged else "raw"
            add(Assumption("ema", f"the {which} copies of kernels, biases and gamma are used"))
        roles: dict[str, list[str]] = {}
        for role, found in match.projections.items():
            if text := self._form_assumption(found):
                roles.setdefault(text, []).append(role)
        for text, alike in roles.items():
            add(Assumption("", f"{', '.join(alike)}: {text}"))

    def _form_assumption(self, found: Projection) -> str:
        form = found.form
        if form.spectral_norm is None and form.requires:
            return (
                "the kernel in the file is the effective one, as torch before 1.0 stored it. Implementations that store the kernel "
                "of the previous step there (rosinality) have a dialect of their own"
            )
        others = [
            other
            for other in self.match.dialect.kernels
            if other.spectral_norm and other.kernel == form.kernel
        ]
        if form.spectral_norm is None and others and not self.settings.plain:
            u = others[0].spectral_norm.u.rpartition("}")[2].strip("./")  # type: ignore[union-attr]
            return f"there is no {u} beside the kernel, so it was trained without spectral norm"
        return ""

    def _read_keys(self) -> list[str]:
        found = self.match.projections.values()
        keys = [key for one in found for key in (one.kernel, one.bias, one.u, one.v)]
        return [key for key in (*keys, self.match.gamma, *self.match.batch_norm.values()) if key]

    def _dtype(self) -> str:
        found = self.match.projections.values()
        keys = [*(one.kernel for one in found), *(one.bias for one in found), self.match.gamma]
        names = [self.infos[key].dtype for key in keys if key]
        known = [name if name in _NUMPY else "float32" for name in names if _is_float(name)]
        return str(np.result_type(*known)) if known else "float32"


_NUMPY = ("float16", "float32", "float64")


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat"))
