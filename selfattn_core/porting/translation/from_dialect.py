"""Computes canonical parameters from the tensors that a dialect found."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.params import parameter_table, projections, state_table
from selfattn_core.porting.blocks.match import Projection
from selfattn_core.porting.blocks.plan import Plan
from selfattn_core.porting.dialects.dialect import SpectralNorm
from selfattn_core.porting.dialects.kernel_axes import to_matrix
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.translation.folding import (
    batch_norm_factor,
    cast,
    spectral_state,
)
from selfattn_core.porting.translation.lazy import LazyArrays, checksum
from selfattn_core.problems import Kind, Problem, Remedy, Text
from selfattn_core.spectral_norm import converged, unlike_unit_vectors

__all__ = ["Imported", "Origin", "check_dtype", "import_block", "state_notes"]

_DTYPES = ("float16", "float32", "float64")


@dataclass(frozen=True)
class Origin:
    """The origin of a canonical tensor.

    Args:
        sources: its keys in the file. Empty for a new tensor.
        shape: the shape of the first source.
        dtype: the dtype of the first source.
        steps: every change, in order.
        sha256: the SHA-256 of the result.
        exact: whether it has the source's values. Their order and dtype may differ.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    steps: tuple[str, ...]
    sha256: str
    exact: bool


@dataclass(frozen=True)
class Imported:
    """A block in canonical form, with the origin of each tensor.

    Args:
        config: the layer.
        params: its arrays. Each is read and folded at every access, so the file must be open.
        origins: the origins by canonical name.
        notes: facts about the state of spectral norm that a user must know.
    """

    config: SelfAttentionConfig
    params: Mapping[str, Array]
    origins: Mapping[str, Origin]
    notes: tuple[Text, ...]


def check_dtype(dtype: str | None) -> None:
    """Refuse a dtype that `import_block` does not accept.

    Raises:
        PortError: with the accepted dtypes.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise PortError(f"dtype {dtype!r}: expected one of {', '.join(_DTYPES)}.", kind="dtype")


def state_notes(planned: Plan, read: Callable[[str], Array]) -> tuple[Text, ...]:
    """Notes on stored vectors u and v that do not have length 1.

    Args:
        planned: a whole block. Nothing is read for a rule that iterates, because it computes unit vectors itself.
        read: a function that returns the values of a key.
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
    note = (
        f"{text}. To compute new ones, port with ",
        keep,
        ", load the layer, and call refresh_spectral_norm on it",
    )
    return (note,)


def import_block(
    planned: Plan,
    read: Callable[[str], Array],
    *,
    dtype: str | None = None,
    keep_spectral_norm: bool = False,
) -> Imported:
    """Read a block and fold it.

    Args:
        planned: a plan without problems.
        read: a function that returns the values of a key.
        dtype: "float16", "float32" or "float64". The default is the source's.
        keep_spectral_norm: keep raw kernels with the vectors u and v instead of dividing.

    Raises:
        PortError: with every tensor that is not finite or does not fit, or with the reason why spectral norm cannot be kept.
    """
    return _Importer(planned, read, dtype or planned.dtype, keep_spectral_norm).run()


@dataclass(frozen=True)
class _Made:
    """A canonical tensor, its sources and its changes."""

    array: Array
    sources: tuple[str, ...]
    steps: list[str]
    exact: bool = True


@dataclass(frozen=True)
class _Norm:
    """The spectral norm of a kernel, with its vectors."""

    u: Array
    v: Array
    sigma: float
    of_zeros: bool


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
        # Only vectors are kept, never a kernel.
        self.norms: dict[str, _Norm] = {}
        # Each problem once, although a tensor may be read several times.
        self.problems: dict[Problem, None] = {}

    def run(self) -> Imported:
        if self.keep:
            self._check_keep()
        config = replace(self.config, spectral_norm=True) if self.keep else self.config
        origins = {name: self._origin(name) for name in (*parameter_table(config), *state_table(config))}
        if self.problems:
            raise PortError.of("the tensors cannot be ported:\n  ", list(self.problems))
        arrays = LazyArrays({name: partial(self._array, name) for name in origins})
        return Imported(config, arrays, origins, state_notes(self.plan, self.source))

    def _array(self, name: str) -> Array:
        return self._make(name).array

    def _origin(self, name: str) -> Origin:
        """Compute a tensor once, to report on it."""
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
        # An overflow in the cast is found afterwards.
        with np.errstate(all="ignore"):
            role, _, part = name.partition(".")
            if name == "gamma":
                return self._gamma()
            found = self.match.projections[role]
            if part == "bias":
                return self._bias(role, found)
            return self._kernel(role, found) if part == "kernel" else self._state(role, part, found)

    def _check_keep(self) -> None:
        reasons = [
            (f"the {role} ({found.kernel}) has no state of it in the file", found.kernel)
            for role, found in self.match.projections.items()
            if found.form.spectral_norm is None
        ]
        lost = "would be lost, because spectral norm cancels a factor of its kernel"
        if self.plan.scale != 1:
            reasons.append((f"the scale of the scores {lost}", "scale"))
        if self.match.batch_norm:
            reasons.append((f"the batch norm {lost}", "batch_norm"))
        if reasons:
            problems = [Problem("keep_spectral_norm", text, (name,)) for text, name in reasons]
            raise PortError.of("spectral norm cannot be kept: ", problems, between="; ")

    def _read(self, key: str) -> Array:
        array = self.source(key)
        known = key in self.stored
        self.stored[key] = (array.shape, str(array.dtype))
        if not known and not np.isfinite(array).all():
            self._problem("not_finite", f"{key} holds NaN or infinity", key)
        return array

    def _kernel(self, role: str, found: Projection) -> _Made:
        matrix = to_matrix(self._read(found.kernel), found.form.axes)
        steps = [] if found.form.axes == "IO" else [f"{found.form.axes} → (C_in, C_out)"]
        sources = [found.kernel]
        divisor = 1.0
        if found.form.spectral_norm and not self.keep:
            sources += [key for key in (found.u, found.v) if key]
            norm = self._norm(role, found, matrix)
            divisor = norm.sigma
            steps.append(
                "zeros, left as they are"
                if norm.of_zeros
                else f"÷ sigma = {divisor:.9g}, uᵀWv {self._how(found.form.spectral_norm)}"
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

    def _norm(self, role: str, found: Projection, matrix: Array | None = None) -> _Norm:
        """The vectors u and v and the norm of a kernel, computed once."""
        if role not in self.norms:
            if matrix is None:
                matrix = to_matrix(self._read(found.kernel), found.form.axes)
            self.norms[role] = self._computed_norm(found, matrix)
        return self.norms[role]

    def _computed_norm(self, found: Projection, matrix: Array) -> _Norm:
        rule = found.form.spectral_norm
        assert rule is not None  # noqa: S101 - the callers have seen it
        if self.plan.settings.sn_eps is not None:
            rule = replace(rule, eps=self.plan.settings.sn_eps)
        stored_u = self._read(found.u)
        stored_v = self._read(found.v) if found.v else None
        # The result after a problem.
        nothing = _Norm(np.ones(matrix.shape[1]), np.ones(matrix.shape[0]), 1.0, of_zeros=not matrix.any())
        try:
            u, v, sigma = spectral_state(rule, matrix, stored_u, stored_v)
        except ValueError as error:
            self._problem("shape", f"{found.kernel}: {error}", found.kernel)
            return nothing
        if nothing.of_zeros:
            # As the definition does. Originals differ, and PyTorch's own gives NaN.
            return _Norm(*converged(matrix), 1.0, of_zeros=True)
        if not abs(sigma) > 0 or not np.isfinite(sigma):
            how = self._how(rule)
            text = (
                f"{found.kernel}: its spectral norm {how} is {sigma:g}, and a kernel cannot be divided by it"
            )
            self._problem("spectral_norm", text, found.kernel)
            return nothing
        return _Norm(u, v, sigma, of_zeros=False)

    def _how(self, rule: SpectralNorm) -> str:
        if rule.sigma == "stored":
            return "of the stored vectors"
        times = "one power iteration" if rule.iterations == 1 else f"{rule.iterations} power iterations"
        return f"after {times} from the stored vector"

    def _state(self, role: str, part: str, found: Projection) -> _Made:
        rule = found.form.spectral_norm
        assert rule is not None  # noqa: S101 - _check_keep has seen it
        norm = self._norm(role, found)
        key = found.u if part == "u" else found.v or found.u
        step = "as stored" if rule.sigma == "stored" else self._how(rule)
        step = "of a kernel of zeros, where any vector is right" if norm.of_zeros else step
        return _Made(np.array(norm.u if part == "u" else norm.v, self.dtype), (key,), [step])

    def _batch_norm(self) -> tuple[Array, Array]:
        """The factor of each channel, and the shift after it."""
        keys, norm = self.match.batch_norm, self.match.variant.batch_norm
        assert norm is not None  # noqa: S101 - there are keys of it
        parts = {part: self._read(key).astype(np.float64) for part, key in keys.items()}
        eps = norm.eps if self.plan.settings.bn_eps is None else self.plan.settings.bn_eps
        if (parts["var"] + eps <= 0).any():
            self._problem(
                "batch_norm", f"{keys['var']} contains a variance that is not positive", keys["var"]
            )
        factor = batch_norm_factor(parts.get("weight"), parts["var"], eps)
        return factor, parts.get("bias", np.zeros(())) - parts["mean"] * factor

    def _bias(self, role: str, found: Projection) -> _Made:
        sources = [found.bias] if found.bias else []
        steps = [] if found.bias else ["zeros, because the original has no bias"]
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
        step = "the original has no gamma" if given is None else "from the settings"
        return _Made(np.array([value], self.dtype), (), [step])
