"""The common data and checks of the adapters' `convert`: a foreign layer, the input for it and ours, and the report."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.conformance.cases.case import Case
from selfattn_core.conformance.cases.inputs import Inputs
from selfattn_core.conformance.verdicts.expected import expect_on
from selfattn_core.conformance.verdicts.tolerance import FACTORS, Expectation, Verdict, measure
from selfattn_core.params import parameter_table
from selfattn_core.porting.blocks.find import index_of
from selfattn_core.porting.blocks.match import match
from selfattn_core.porting.blocks.plan import Plan, plan
from selfattn_core.porting.dialects.catalogue import dialect
from selfattn_core.porting.dialects.dialect import Dialect
from selfattn_core.porting.dialects.settings import Settings, settings_of
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats import Tensors
from selfattn_core.porting.inspect import candidates, named
from selfattn_core.porting.report import listed
from selfattn_core.porting.translation.from_dialect import Origin, import_block
from selfattn_core.porting.verify import designed_input
from selfattn_core.problems import Problem, in_python

__all__ = [
    "Conversion",
    "ConversionError",
    "ConvertedLayer",
    "Foreign",
    "Question",
    "agreement",
    "apart",
    "check_arguments",
    "chosen_dialect",
    "compared",
    "nested",
    "no_match",
    "question",
    "read_layer",
    "refuse",
    "sizes",
]

Model = TypeVar("Model")


@dataclass(frozen=True)
class Foreign:
    """A foreign layer as its dialect reads it.

    Args:
        config: the config of the new layer.
        params: arrays by canonical name, in the precision of the foreign layer. In float32 if that has 16 bits.
        origins: the origin of each array.
        axes: the axes of each kernel in the foreign layer, by canonical name.
        divided: whether the kernels were divided by their spectral norms, so that the new layer has no spectral norm.
        batch_norm: whether a batch norm was folded into the last projection.
        assumptions: facts that its tensors do not show.
        notes: other facts that a user must know.
    """

    config: SelfAttentionConfig
    params: Mapping[str, Array]
    origins: Mapping[str, Origin]
    axes: Mapping[str, str]
    divided: bool
    batch_norm: bool
    assumptions: tuple[str, ...]
    notes: tuple[str, ...]

    def source(self, name: str) -> str:
        """The one key whose values a canonical parameter has, in any order. "" if there is no such key."""
        origin = self.origins[name]
        return origin.sources[0] if len(origin.sources) == 1 and origin.exact else ""

    @property
    def made(self) -> tuple[str, ...]:
        """The parameters that the foreign layer does not have."""
        return tuple(name for name in parameter_table(self.config) if not self.origins[name].sources)


@dataclass(frozen=True)
class Question:
    """The input that the foreign layer and ours get.

    Args:
        params: the parameters of both layers, float32 or float64. gamma is not 0.
        x: (B, H, W, C).
        dy: the gradient with respect to y.
    """

    params: Mapping[str, Array]
    x: Array
    dy: Array

    @property
    def gamma(self) -> float:
        """The gamma of both layers."""
        return float(self.params["gamma"][0])


@dataclass(frozen=True)
class ConvertedLayer:
    """One layer that was replaced, or would be.

    Args:
        names: its names in the model. A layer in several places has several.
        was: the class of the foreign layer.
        dialect: the dialect of the foreign layer.
        config: the config of the new layer, from `SelfAttentionConfig.to_dict`.
        old: the largest errors of the foreign layer in noise floors, by quantity.
        new: the largest errors of the new layer, in the same form.
        failures: the reasons why it is not the same layer. Empty if it is.
        returns_map: whether it returns (y, A).
        assumptions: facts that the foreign layer's tensors do not show.
        notes: other facts that a user must know.
    """

    names: tuple[str, ...]
    was: str
    dialect: str
    config: dict[str, int | bool]
    old: dict[str, float]
    new: dict[str, float]
    failures: tuple[str, ...]
    returns_map: bool
    assumptions: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Conversion(Generic[Model]):
    """A model in which foreign attention layers have become ours.

    Args:
        model: the model with our layers. None after a dry run.
        layers: the layers that were replaced.
    """

    model: Model | None = field(repr=False)
    layers: tuple[ConvertedLayer, ...]

    @property
    def passed(self) -> bool:
        """Whether every new layer computes the same as the layer that it replaces."""
        return not any(layer.failures for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The report without the model, as a dictionary that JSON can hold."""
        layers = [asdict(layer) for layer in self.layers]
        return {"kind": "selfattn conversion", "version": 1, "passed": self.passed, "layers": layers}

    def to_text(self) -> str:
        """The report as text."""
        done = "would be replaced" if self.model is None else "replaced"
        lines = [f"{len(self.layers)} layers {done}; errors in noise floors, of which 8 are allowed"]
        for layer in self.layers:
            config = ", ".join(f"{name}={value}" for name, value in layer.config.items())
            pair = ", returns (y, A)" if layer.returns_map else ""
            lines.append(
                f"{', '.join(layer.names) or 'the model itself'}: {layer.was} ({layer.dialect}) → {config}{pair}"
            )
            lines += [
                f"  {who}: {_floors(errors)}" for who, errors in (("was", layer.old), ("is", layer.new))
            ]
            lines += [f"  assumed: {text}" for text in layer.assumptions]
            lines += [f"  note: {text}" for text in layer.notes]
            lines += [f"  differs: {text}" for text in layer.failures]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.to_text()


class ConversionError(PortError):
    """A foreign layer does not compute what its dialect describes. The model is unchanged.

    Args:
        report: the report on all layers. Its model is None.
    """

    def __init__(self, report: Conversion[Any]) -> None:
        failed = [layer for layer in report.layers if layer.failures]
        texts = [
            f"{layer.names[0] or 'the model itself'} ({layer.was}) as {layer.dialect}: {'; '.join(layer.failures)}"
            for layer in failed
        ]
        super().__init__(
            f"nothing was replaced, because {len(failed)} of {len(report.layers)} layers do not compute what their dialect describes. "
            "Name the dialect of the layer's own code, or describe the layer in a .toml file:\n  "
            + "\n  ".join(texts)
        )
        self.report = report


def chosen_dialect(name: str | None, tensors: Tensors, agrees: Callable[[Dialect], bool]) -> Dialect:
    """The dialect of this name. Without a name, the only one that fits the keys of a layer.

    Args:
        name: the name of the dialect, or None.
        tensors: the tensors of the layer.
        agrees: a function that tells whether the layer computes what a dialect describes, for the message.

    Raises:
        PortError: if there is no name, and no dialect or several fit.
    """
    if name is not None:
        return dialect(name)
    found = candidates(tensors)
    if [fit.verdict for fit in found.values()] == ["fits"]:
        return dialect(*found)
    fits = f"its keys fit {named(found)}" if found else f"its keys fit no dialect: {listed(list(tensors))}"
    hint = agreement(None, tensors, agrees)
    raise PortError(
        f"{tensors.path}: choose its dialect with dialect=: {fits}{f'; {hint}' if hint else ''}. A .toml file of your own can "
        "describe any other layer.",
        kind="dialect_needed",
        names=list(found),
    )


def agreement(tried: Dialect | None, tensors: Tensors, agrees: Callable[[Dialect], bool]) -> str:
    """The dialects that have the keys of a layer and describe what it computes, for a message. "" if there are none.

    Args:
        tried: a dialect that does not describe it.
        tensors: the tensors of the layer.
        agrees: a function that tells whether the layer computes what a dialect describes.
    """
    names = [name for name, fit in candidates(tensors).items() if fit.verdict == "fits"]
    right = [name for name in names if (tried is None or name != tried.name) and agrees(dialect(name))]
    return f"the layer computes what {' and '.join(right)} describe{'s' * (len(right) == 1)}" if right else ""


def read_layer(
    tensors: Tensors,
    chosen: Dialect,
    settings: Mapping[str, str | bool | float],
    *,
    keep_spectral_norm: bool,
) -> Foreign:
    """Read a layer's own tensors in a dialect.

    Args:
        tensors: the tensors of the layer, in the form that its framework saves.
        chosen: the dialect.
        settings: facts that the tensors do not show.
        keep_spectral_norm: whether a layer that has spectral norm on every kernel keeps it.

    Raises:
        PortError: if the dialect does not fit, with every problem.
    """
    planned = _plan(tensors, chosen, settings_of(chosen, settings))
    projections = planned.match.projections
    norms = [one.form.spectral_norm is not None for one in projections.values()]
    axes = {f"{role}.kernel": one.form.axes for role, one in projections.items()}
    try:
        block = import_block(
            planned,
            tensors.read,
            dtype=str(np.result_type(planned.dtype, np.float32)),
            keep_spectral_norm=keep_spectral_norm and any(norms),
        )
    except PortError as error:
        advice = ""
        if keep_spectral_norm and any(norms):
            advice = ". With keep_spectral_norm=False the kernels are divided by it once, and training continues without it"
        raise error.within(f"{tensors.path}: ", advice) from error
    assumptions = tuple(one.text for one in planned.assumptions)
    params = {name: np.array(array) for name, array in block.params.items()}
    notes = [in_python(note) for note in block.notes]
    batch_norm = bool(planned.match.batch_norm)
    if batch_norm:
        notes.append(
            "its batch norm is now part of the kernel and bias, as in evaluation mode, and training continues without it"
        )
    # The dialect's caveats are about facts that keys do not show. Here the layer itself runs.
    divided = any(norms) and not block.config.spectral_norm
    return Foreign(block.config, params, block.origins, axes, divided, batch_norm, assumptions, tuple(notes))


def _plan(tensors: Tensors, chosen: Dialect, settings: Settings) -> Plan:
    chosen.check_expressible("converted", where=f"{tensors.path}: ")
    found = match(chosen, index_of(tensors), "", averaged=settings.ema)
    reasons = [Problem("other_function", telltale.reason, (telltale.key,)) for telltale in found.telltales]
    if found.missing:
        reasons.append(Problem("missing", f"it has no {listed(found.missing)}", found.missing))
    if found.ambiguous:
        names = (found.variant.name, *found.ambiguous)
        text = f"the variants {found.variant.name} and {', '.join(found.ambiguous)} fit equally well"
        reasons.append(Problem("ambiguous", text, names))
    if found.unused:
        text = f"unused: {listed(found.unused)}, which may change what the layer computes"
        reasons.append(Problem("unused", text, found.unused))
    planned = plan(found, tensors, settings)
    reasons += [] if found.missing else planned.problems
    reasons += [Problem("unusable", reason, (key,)) for key, reason in tensors.left_out.items()]
    if reasons:
        raise PortError.of(
            f"{tensors.path}: is not {chosen.name} ({chosen.title}): ", reasons, between="; ", end="."
        )
    return planned


def check_arguments(
    *, match: Any, kind: type, settings: Any, size: Any, returns: Any, dialect: Any, block_size: Any
) -> None:
    """Refuse arguments that no `convert` accepts, all at once and before anything is computed.

    Args:
        match: as in `convert`.
        kind: the class of the framework's modules.
        settings: as in `convert`.
        size: as in `convert`.
        returns: as in `convert`.
        dialect: as in `convert`.
        block_size: as in `convert`.

    Raises:
        ValueError: with every wrong argument.
    """
    problems = []
    if returns not in ("same", "output"):
        problems.append(f"returns={returns!r}; expected 'same' or 'output'")
    kinds = match if isinstance(match, tuple) else (match,)
    classes = all(isinstance(each, type) and issubclass(each, kind) for each in kinds) and kinds
    if match is not None and not (classes or isinstance(match, str) or _is_function(match)):
        problems.append(
            f"match={match!r}; expected a class of modules, a tuple of classes, a name with *, or a function of name and module"
        )
    whole = isinstance(size, tuple | list) and len(size) == 2
    if size is not None and not (
        whole and all(isinstance(each, int) and not isinstance(each, bool) for each in size)
    ):
        problems.append(f"size={size!r}; expected (H, W), two whole numbers")
    if settings is not None and not isinstance(settings, Mapping):
        problems.append(f"settings={settings!r}; expected a dictionary such as {{'use_scale': False}}")
    if dialect is not None and not isinstance(dialect, str):
        problems.append(f"dialect={dialect!r}; expected a name of `selfattn dialects` or a .toml file")
    if dialect is None and match is None:
        problems.append("neither dialect nor match is given; pass dialect=, match= or both")
    if block_size is not None and (not isinstance(block_size, int) or block_size < 1):
        problems.append(f"block_size={block_size!r}; expected a positive whole number or None")
    if problems:
        raise ValueError(f"convert: got {'; '.join(problems)}.")


def _is_function(match: Any) -> bool:
    return callable(match) and not isinstance(match, type)


def no_match(
    model_parts: str, match: Any, dialect: str | None, kinds: Iterable[type], more: str = ""
) -> PortError:
    """What to raise where nothing in a model matches.

    Args:
        model_parts: the framework's word for them, "module" or "layer".
        match: as in `convert`.
        dialect: as in `convert`.
        kinds: the classes in the model.
        more: another possible cause.
    """
    what = f"that match={match!r} selects" if match is not None else f"with the keys of {dialect}"
    names = ", ".join(sorted({kind.__name__ for kind in kinds}))
    return PortError(
        f"convert: the model has no {model_parts} {what}, and is unchanged. Its {model_parts}s are of the classes {names}{more}. Pass "
        "the class of the attention layer as match=, and its dialect as dialect=."
    )


def nested(names: Collection[str]) -> list[str]:
    """The reasons why nested layers cannot all be replaced.

    Example:
        >>> nested(["attention", "attention.query", "head"])
        ['attention.query lies inside attention, and both match; narrow match=']
    """
    return [
        f"{inner} lies inside {outer or 'the model itself'}, and both match; narrow match="
        for inner in sorted(names)
        for outer in sorted(names)
        if inner.startswith(f"{outer}." if outer else outer) and inner != outer
    ]


def sizes(config: SelfAttentionConfig, size: tuple[int, int] | None) -> tuple[tuple[int, int], ...]:
    """(H, W) of the inputs for both layers. By default there are two.

    The first is small and has complete pooling windows, which many layers need. The second has pooling windows that are cut
    off, and it is large enough to reveal a layer that attends within neighbourhoods.

    Args:
        config: the layer.
        size: the user's size, or None.

    Example:
        >>> sizes(SelfAttentionConfig(16, kv_pool=2), None)
        ((8, 6), (17, 19))
    """
    side = config.kv_pool
    if size is not None:
        return ((size[0], size[1]),)
    return (4 * side, 3 * side), (max(17, 2 * side + 1), max(19, 3 * side + 1))


def question(foreign: Foreign, size: tuple[int, int]) -> Question:
    """An input that reveals a wrong layer.

    Args:
        foreign: the layer.
        size: (H, W) of the input, from `sizes`.

    Raises:
        PortError: if the layer accepts no input of that size.
    """
    side = foreign.config.kv_pool
    if min(size) < side:
        raise PortError(
            f"size={size}: expected (H, W) of at least {side} × {side}, the layer's pooling window."
        )
    params, x, _ = designed_input(foreign.config, foreign.params, size=size)
    dy = np.random.Generator(np.random.PCG64(1)).standard_normal(x.shape).astype(x.dtype)
    return Question(params, x, dy)


def apart(foreign: Foreign, asked: Question, old: Array, new: Array) -> float:
    """The difference of both layers' outputs in training, in noise floors. Twice 8 is allowed.

    Args:
        foreign: the layer.
        asked: the input.
        old: the output of the foreign layer, (B, H, W, C).
        new: the output of ours.
    """
    floor = _expected(foreign, asked, "forward", str(asked.x.dtype))["y"].floor
    return float(np.abs(np.asarray(old, np.float64) - np.asarray(new, np.float64)).max(initial=0)) / floor


def compared(
    foreign: Foreign, asked: Question, old: Mapping[str, Array], new: Mapping[str, Array]
) -> tuple[dict[str, float], dict[str, float], tuple[str, ...]]:
    """Compare the answers of both layers with the definition, within the limits of the conformance kit.

    Args:
        foreign: the layer.
        asked: the input.
        old: its own answers in the shapes of the definition: any of "y", "map" (B, N, M), "x" for the gradient with respect to
            x, and gradients by canonical name.
        new: the answers of the new layer, in the same form.

    Returns:
        The errors of both in noise floors by quantity, and a text for each layer beyond the limits.
    """
    judged = [_judge(foreign, asked, answers) for answers in (old, new)]
    wrong = [
        f"the {who} layer is off by {_floors({each.quantity: each.ratio for each in verdicts if not each.passed})} noise floors"
        for who, verdicts in zip(("old", "new"), judged, strict=True)
        if not all(each.passed for each in verdicts)
    ]
    floors = [{each.quantity: each.ratio for each in verdicts} for verdicts in judged]
    return floors[0], floors[1], tuple(wrong)


def refuse(problems: Sequence[str]) -> None:
    """Raise all problems at once, if there are any.

    Raises:
        PortError: with every problem. The model is unchanged.
    """
    if problems:
        raise PortError(
            "nothing was replaced, and the model is unchanged:\n  " + "\n  ".join(dict.fromkeys(problems))
        )


def _judge(foreign: Foreign, asked: Question, found: Mapping[str, Array]) -> list[Verdict]:
    dtype = str(asked.x.dtype)
    verdicts = []
    for family, names in (
        ("forward", {"y"}),
        ("map", {"map"}),
        ("vjp", {"x", *parameter_table(foreign.config)}),
    ):
        if there := names & set(found):
            wanted = _expected(foreign, asked, family, dtype)
            for name in sorted(there, key=list(wanted).index):
                answer = np.asarray(found[name], np.float64)
                verdicts.append(measure(name, answer, wanted[name], FACTORS[dtype]))
    return verdicts


def _expected(foreign: Foreign, asked: Question, family: Any, dtype: str) -> Mapping[str, Expectation]:
    case = Case(
        "convert", family, "convert", foreign.config, asked.x.shape[:3], gamma=asked.gamma, dtypes=(dtype,)
    )
    given = _held(asked, dtype)
    # float64 uses the error of float32, as in the kit.
    return expect_on(case, given, given if dtype == "float32" else _held(asked, "float32"), dtype)


def _held(asked: Question, dtype: str) -> Inputs:
    params = {name: array.astype(dtype) for name, array in asked.params.items()}
    return Inputs(params, asked.x.astype(dtype), asked.dy.astype(dtype))


def _floors(errors: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2g}" for name, value in errors.items())
