"""From the tensors that a dialect found to a config and canonical parameters."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from selfattn_core.config import SelfAttentionConfig
from selfattn_core.params import parameter_table, projections, state_table
from selfattn_core.porting.blocks.match import Match, Projection
from selfattn_core.porting.dialects.dialect import SpectralNorm
from selfattn_core.porting.dialects.settings import Assumption, Settings
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.translation.folding import (
    batch_norm_factor,
    cast,
    matrix_shape,
    spectral_state,
    to_matrix,
)
from selfattn_core.porting.translation.lazy import LazyArrays
from selfattn_core.problems import Kind, Problem, Remedy, Text
from selfattn_core.spectral_norm import converged, unlike_unit_vectors

__all__ = ["Imported", "Listed", "Origin", "Plan", "checksum", "import_block", "plan", "state_notes"]

Array = NDArray[Any]


class Listed(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""

    @property
    def dtype(self) -> str:
        """As stored, in numpy's and ml_dtypes' names."""


@dataclass(frozen=True)
class Plan:
    """What a block becomes, known from keys and shapes alone.

    Args:
        match: what the dialect found.
        config: the layer; None where the shapes give none.
        scale: what the scores are multiplied by.
        settings: of the dialect.
        assumptions: what the file does not show.
        problems: why it cannot be ported.
        dtype: that the source has, widened to one that numpy has.
    """

    match: Match
    config: SelfAttentionConfig | None
    scale: float
    settings: Settings
    assumptions: tuple[Assumption, ...]
    problems: tuple[Problem, ...]
    dtype: str


@dataclass(frozen=True)
class Origin:
    """Where a canonical tensor comes from.

    Args:
        sources: keys of the file; none for what is made.
        shape: of the first source.
        dtype: of the first source.
        steps: what was done, in order.
        sha256: of the result.
        exact: whether its numbers are those of the source, at most in another order or dtype.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    steps: tuple[str, ...]
    sha256: str
    exact: bool


@dataclass(frozen=True)
class Imported:
    """A block in canonical form, and where each of its tensors comes from.

    Args:
        config: the layer.
        params: its arrays, each read and folded at every access, so the file must be open.
        origins: by canonical name.
        notes: what a person must know of the state of spectral norm.
    """

    config: SelfAttentionConfig
    params: Mapping[str, Array]
    origins: Mapping[str, Origin]
    notes: tuple[Text, ...]


def checksum(array: Array) -> str:
    """The sha256 of an array's bytes in C order.

    Example:
        >>> checksum(np.zeros(1, np.float32))[:8]
        'df3f6198'
    """
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def plan(match: Match, infos: Mapping[str, Listed], settings: Settings) -> Plan:
    """What a block becomes; nothing is read.

    Args:
        match: a whole one.
        infos: shapes and dtypes by key.
        settings: of the dialect.
    """
    return _Planner(match, infos, settings).plan()


class _Planner:
    def __init__(self, match: Match, infos: Mapping[str, Listed], settings: Settings) -> None:
        self.match = match
        self.infos = infos
        self.settings = settings
        self.problems: list[Problem] = []
        self.assumptions: list[Assumption] = []

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
        self._gamma()
        for key in self._read_keys():
            if not _is_float(self.infos[key].dtype):
                self._problem("dtype", f"{key} is {self.infos[key].dtype}, should be floating point", key)
        self._assume(variant.kv_pool if self.settings.kv_pool is None else self.settings.kv_pool, scale)
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
                f"{key}, the value, has {value_channels} channels and the map {channels}: without an out projection they are "
                "added, and should be as many",
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
        """Sizes of biases and of the batch norm."""
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
                    f"{name} is {found}, and {dialect.name} makes {width} of {config.channels} channels: another "
                    "implementation with the same keys; `selfattn inspect` lists those that fit",
                    name,
                )
            else:
                self.assumptions.append(
                    Assumption(
                        "",
                        f"{name} is {found}, where the original makes {width} of {config.channels} channels: "
                        "the file is from a changed copy, taken to compute the same function",
                    )
                )

    def _gamma(self) -> None:
        dialect, key = self.match.dialect, self.match.gamma
        if key:
            shape = self.infos[key].shape
            if int(np.prod(shape)) != 1:
                self._problem(
                    "shape",
                    f"{key} has shape {shape}; expected one element, the gain of the whole residual: a gain per sample "
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
                "gamma is not in the file: give the value that it had with ",
                Remedy("settings", setting="gamma"),
                " (a plain tensor that was never made a parameter was never trained: it has its initial value, 0 in the ",
                "published layers, and the layer is the identity)",
            )
            self._problem("gamma_not_stored", text)

    def _assume(self, kv_pool: int, scale: float) -> None:
        dialect, match, settings = self.match.dialect, self.match, self.settings
        add = self.assumptions.append
        if not dialect.kv_pool_stored:
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
            add(Assumption("gamma", f"gamma = {settings.gamma:g}, as it was set"))
        elif dialect.gamma_value is not None:
            add(Assumption("", f"the original has no gamma and acts like {dialect.gamma_value:g}"))
        rules = {found.form.spectral_norm for found in match.projections.values()}
        for rule in sorted((r for r in rules if r and r.sigma == "iterate"), key=repr):
            eps = rule.eps if settings.sn_eps is None else settings.sn_eps
            add(Assumption("sn_eps", f"sn_eps = {eps:g}, of the power iteration"))
        if match.variant.batch_norm:
            eps = match.variant.batch_norm.eps if settings.bn_eps is None else settings.bn_eps
            add(Assumption("bn_eps", f"bn_eps = {eps:g}, of the batch norm"))
        if dialect.ema_first or match.averages:
            which = "averaged" if match.averaged else "raw"
            add(Assumption("ema", f"the {which} copies of kernels, biases and gamma are taken"))
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
                "the kernel in the file is taken as the effective one, as torch before 1.0 stored it; where an implementation "
                "keeps the previous step's there (rosinality), its own dialect does otherwise"
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


def state_notes(planned: Plan, read: Callable[[str], Array]) -> tuple[Text, ...]:
    """What there is to say of stored vectors u and v that are not of length 1.

    Args:
        planned: a whole block. A rule that iterates makes unit vectors by itself, so nothing is read then.
        read: gives the values of a key.
    """
    keys = [
        key
        for found in planned.match.projections.values()
        if found.form.spectral_norm and found.form.spectral_norm.sigma == "stored"
        for key in (found.u, found.v)
        if key
    ]
    arrays = {key: read(key) for key in keys}
    text = unlike_unit_vectors({key: array for key, array in arrays.items() if np.isfinite(array).all()})
    if not text:
        return ()
    keep = Remedy("keep_spectral_norm", value=True)
    return (
        (
            f"{text}. To make them anew, port with ",
            keep,
            ", load the layer, and call refresh_spectral_norm on it",
        ),
    )


def import_block(
    planned: Plan,
    read: Callable[[str], Array],
    *,
    dtype: str | None = None,
    keep_spectral_norm: bool = False,
) -> Imported:
    """Read a block and fold it.

    Args:
        planned: without problems.
        read: gives the values of a key.
        dtype: "float16", "float32" or "float64"; by default the source's.
        keep_spectral_norm: keep raw kernels with the vectors u and v instead of dividing.

    Raises:
        PortError: naming every tensor that is not finite or does not fit, or why spectral norm cannot be kept.
    """
    return _Importer(planned, read, dtype or planned.dtype, keep_spectral_norm).run()


@dataclass(frozen=True)
class _Made:
    """A canonical tensor and how it was made."""

    array: Array
    sources: tuple[str, ...]
    steps: list[str]
    exact: bool = True


class _Importer:
    def __init__(self, planned: Plan, read: Callable[[str], Array], dtype: str, keep: bool) -> None:
        if planned.config is None:
            raise PortError.of("", planned.problems, between="; ")
        self.plan = planned
        self.match = planned.match
        self.config = planned.config
        self.source = read
        self.dtype = dtype
        self.keep = keep
        self.stored: dict[str, tuple[tuple[int, ...], str]] = {}
        # Each once, although a tensor is read for several others.
        self.problems: dict[Problem, None] = {}

    def run(self) -> Imported:
        if self.keep:
            self._check_keep()
        config = _with_spectral_norm(self.config) if self.keep else self.config
        origins = {name: self._origin(name) for name in (*parameter_table(config), *state_table(config))}
        if self.problems:
            raise PortError.of("the tensors cannot be ported:", list(self.problems))
        arrays = LazyArrays({name: partial(self._array, name) for name in origins})
        return Imported(config, arrays, origins, state_notes(self.plan, self.source))

    def _array(self, name: str) -> Array:
        return self._make(name).array

    def _origin(self, name: str) -> Origin:
        """Make a tensor once, for what there is to say of it."""
        made = self._make(name)
        sources, steps = made.sources, list(made.steps)
        shape, dtype = self.stored[sources[0]] if sources else (made.array.shape, str(made.array.dtype))
        if str(made.array.dtype) != dtype:
            steps.append(f"{dtype} → {made.array.dtype}")
        read = {*made.sources}
        if name.endswith((".u", ".v")):
            read.add(self.match.projections[name[:-2]].kernel)
        named = {key for problem in self.problems for key in problem.names}
        if not read & named and not np.isfinite(made.array).all():
            self._problem("not_finite", f"{name} is not finite after {'; '.join(steps)}", name)
        return Origin(sources, shape, dtype, tuple(steps), checksum(made.array), made.exact)

    def _problem(self, kind: Kind, text: Text, *names: str) -> None:
        self.problems[Problem(kind, text, names)] = None

    def _make(self, name: str) -> _Made:
        # What overflows in the cast is found afterwards.
        with np.errstate(all="ignore"):
            role, _, part = name.partition(".")
            if name == "gamma":
                return self._gamma()
            found = self.match.projections[role]
            if part == "bias":
                return self._bias(role, found)
            return self._kernel(role, found) if part == "kernel" else self._state(part, found)

    def _check_keep(self) -> None:
        reasons = [
            (f"the {role} ({found.kernel}) has no state of it in the file", found.kernel)
            for role, found in self.match.projections.items()
            if found.form.spectral_norm is None
        ]
        lost = "would be lost: spectral norm undoes a factor of its kernel"
        if self.plan.scale != 1:
            reasons.append((f"the scale of the scores {lost}", "scale"))
        if self.match.batch_norm:
            reasons.append((f"the batch norm {lost}", "batch_norm"))
        if reasons:
            problems = [Problem("keep_spectral_norm", text, (name,)) for text, name in reasons]
            raise PortError.of("spectral norm cannot be kept: ", problems, between="; ")

    def _read(self, key: str) -> Array:
        array = self.source(key)
        self.stored[key] = (array.shape, str(array.dtype))
        if not np.isfinite(array).all():
            self._problem("not_finite", f"{key} holds NaN or infinity", key)
        return array

    def _kernel(self, role: str, found: Projection) -> _Made:
        matrix = to_matrix(self._read(found.kernel), found.form.axes)
        steps = [] if found.form.axes == "IO" else [f"{found.form.axes} → (C_in, C_out)"]
        sources = [found.kernel]
        divisor = 1.0
        if found.form.spectral_norm and not self.keep:
            sources += [key for key in (found.u, found.v) if key]
            divisor = self._sigma(found, matrix)[2]
            steps.append(
                f"÷ sigma = {divisor:.9g}, uᵀWv {self._how(found.form.spectral_norm)}"
                if matrix.any()
                else "zeros, which no sigma divides"
            )
        factor: Array | float = 1.0
        if role == "query" and self.plan.scale != 1:
            factor = self.plan.scale
            steps.append(f"× {factor:.6g}, the scale of the scores")
        if role == "out" and self.match.batch_norm:
            factor = self._batch_norm()[0]
            sources += [key for part, key in self.match.batch_norm.items() if part in ("weight", "var")]
            steps.append("× batch norm's factor of each channel")
        exact = isinstance(factor, float) and divisor == factor == 1
        array = cast(matrix, self.dtype, divisor=divisor, factor=factor)
        return _Made(array, tuple(sources), steps, exact)

    def _sigma(self, found: Projection, matrix: Array) -> tuple[Array, Array, float]:
        """The vectors u and v and the norm; ones where they cannot be had, with a problem noted."""
        rule = found.form.spectral_norm
        assert rule is not None  # noqa: S101 - the callers have seen it
        if self.plan.settings.sn_eps is not None:
            rule = replace(rule, eps=self.plan.settings.sn_eps)
        stored_u = self._read(found.u)
        stored_v = self._read(found.v) if found.v else None
        nothing = np.ones(matrix.shape[1]), np.ones(matrix.shape[0]), 1.0
        try:
            u, v, sigma = spectral_state(rule, matrix, stored_u, stored_v)
        except ValueError as error:
            self._problem("shape", f"{found.kernel}: {error}", found.kernel)
            return nothing
        if not matrix.any():
            # As the specification has it; originals differ, and PyTorch's own gives NaN.
            return *converged(matrix), 1.0
        if not abs(sigma) > 0 or not np.isfinite(sigma):
            how = self._how(rule)
            text = f"{found.kernel}: its spectral norm {how} is {sigma:g}; a kernel cannot be divided by it"
            self._problem("spectral_norm", text, found.kernel)
            return nothing
        return u, v, sigma

    def _how(self, rule: SpectralNorm) -> str:
        if rule.sigma == "stored":
            return "of the stored vectors"
        times = "one power iteration" if rule.iterations == 1 else f"{rule.iterations} power iterations"
        return f"after {times} from the stored vector"

    def _state(self, part: str, found: Projection) -> _Made:
        rule = found.form.spectral_norm
        assert rule is not None  # noqa: S101 - _check_keep has seen it
        matrix = to_matrix(self._read(found.kernel), found.form.axes)
        u, v, _ = self._sigma(found, matrix)
        key = found.u if part == "u" else found.v or found.u
        step = "as stored" if rule.sigma == "stored" else self._how(rule)
        step = step if matrix.any() else "of a kernel of zeros: any would do"
        return _Made(np.array(u if part == "u" else v, self.dtype), (key,), [step])

    def _batch_norm(self) -> tuple[Array, Array]:
        """The factor of each channel and what is added after it."""
        keys, norm = self.match.batch_norm, self.match.variant.batch_norm
        assert norm is not None  # noqa: S101 - there are keys of it
        parts = {part: self._read(key).astype(np.float64) for part, key in keys.items()}
        eps = norm.eps if self.plan.settings.bn_eps is None else self.plan.settings.bn_eps
        if (parts["var"] + eps <= 0).any():
            self._problem("batch_norm", f"{keys['var']} holds a variance that is not positive", keys["var"])
        factor = batch_norm_factor(parts.get("weight"), parts["var"], eps)
        return factor, parts.get("bias", np.zeros(())) - parts["mean"] * factor

    def _bias(self, role: str, found: Projection) -> _Made:
        sources = [found.bias] if found.bias else []
        steps = [] if found.bias else ["zeros, the original has none"]
        length = projections(self.config)[role][1]
        stored = self._read(found.bias) if found.bias else np.zeros(length, self.dtype)
        if role == "out" and self.match.batch_norm:
            factor, shift = self._batch_norm()
            sources += list(self.match.batch_norm.values())
            steps.append("× batch norm's factor, − mean × factor, + its bias")
            array = (stored.astype(np.float64) * factor + shift).astype(self.dtype)
            return _Made(array, tuple(sources), steps, exact=False)
        scale = self.plan.scale if role == "query" else 1.0
        if found.bias and scale != 1:
            steps.append(f"× {scale:.6g}, the scale of the scores")
        return _Made(cast(stored, self.dtype, factor=scale), tuple(sources), steps, exact=scale == 1)

    def _gamma(self) -> _Made:
        key = self.match.gamma
        if key:
            return _Made(self._read(key).reshape(1).astype(self.dtype), (key,), [])
        given = self.plan.settings.gamma
        value = self.match.dialect.gamma_value if given is None else given
        step = "the original has none" if given is None else "as it was set"
        return _Made(np.array([value], self.dtype), (), [step])


def _with_spectral_norm(config: SelfAttentionConfig) -> SelfAttentionConfig:
    return SelfAttentionConfig.from_dict(config.to_dict() | {"spectral_norm": True})
