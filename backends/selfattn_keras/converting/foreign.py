"""A foreign attention layer of a Keras model: its tensors, its outputs and gradients, and its replacement."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import numpy as np

from selfattn_core.arrays import Array, widen
from selfattn_core.params import parameter_table, projections
from selfattn_core.porting.dialects.dialect import Dialect
from selfattn_core.porting.dialects.kernel_axes import to_matrix
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats.tensors import Entry, Tensors
from selfattn_core.porting.networks.conversion import (
    ConvertedLayer,
    Foreign,
    Question,
)
from selfattn_core.porting.networks.foreign_layer import ForeignLayerBase, Options, notes_of
from selfattn_keras.converting.answers import WrongResultError, ask, asked_in, everything_in
from selfattn_keras.converting.tensors import stored
from selfattn_keras.layer import SelfAttention2D
from selfattn_keras.weights import from_canonical, to_canonical, undrawn, variable
from selfattn_keras.with_map import SelfAttention2DWithMap

__all__ = ["ForeignLayer"]


# The most positions of an input whose map still counts as small.
_MOST_POSITIONS = 1024


@dataclass(frozen=True)
class _Verified:
    """The result of a comparison: whether the layer returns (y, A), both errors in noise floors, failures and notes."""

    pair: bool
    old: dict[str, float]
    new: dict[str, float]
    failures: tuple[str, ...]
    notes: tuple[str, ...]


class ForeignLayer(ForeignLayerBase[SelfAttention2D]):
    """One layer to be replaced.

    Args:
        layer: the built layer.
        names: names of all its places in the model.
        options: options of the conversion.
    """

    def __init__(self, layer: Any, names: tuple[str, ...], options: Options) -> None:
        super().__init__(layer, names, options)
        self.tensors, self.variables = stored(layer, self.where)
        self.values = _without_zeros(layer)
        places = {id(each): place for place, each in enumerate(layer.variables)}
        drawn = {key: self.values[places[id(each)]] for key, each in self.variables.items()}
        self.probe = Tensors(
            self.tensors.path,
            self.tensors.format,
            {
                key: Entry(
                    self.tensors[key], drawn[key].copy if key in drawn else partial(self.tensors.read, key)
                )
                for key in self.tensors
            },
            self.tensors.metadata,
            pools=self.tensors.pools,
        )
        formats = {each.data_format for each in everything_in(layer) if hasattr(each, "data_format")}
        self.data_format: str = formats.pop() if len(formats) == 1 else keras.config.image_data_format()

    def _twin(self, dialect: Dialect) -> tuple[SelfAttention2D, ConvertedLayer]:
        foreign, probed = self._read(self.tensors, dialect), self._read(self.probe, dialect)
        verified = self._verified(probed)
        keep = verified.pair and self.options.returns == "same"
        new, notes = self._dressed(foreign, pair=keep, dropped_map=verified.pair and not keep)
        report = ConvertedLayer(
            self.names,
            type(self.layer).__name__,
            dialect.name,
            foreign.config.to_dict(),
            verified.old,
            verified.new,
            verified.failures,
            returns_map=isinstance(new, SelfAttention2DWithMap),
            assumptions=foreign.assumptions,
            notes=(*foreign.notes, *verified.notes, *notes),
        )
        return new, report

    def _verified(self, foreign: Foreign) -> "_Verified":
        """Compare both layers at every size at which the old one runs, and once in training."""
        asked_at: list[tuple[Question, bool]] = []
        said: list[str] = []

        def answers(asked: Question) -> tuple[Mapping[str, Array], Mapping[str, Array]]:
            pair, theirs, notes = self._ask(foreign, asked)
            asked_at.append((asked, pair))
            said.extend(notes)
            return theirs, self._answers(foreign, asked, pair=pair)

        old, new, wrong, notes = self._compared(foreign, answers, also=self._built_size())
        failures = list(wrong)
        pairs = {pair for _, pair in asked_at}
        if len(pairs) > 1:
            failures.append("the old layer returns (y, A) at some sizes and y at others")
        asked, pair = asked_at[-1]
        failure, note = self._in_training(foreign, asked, pair=pair)
        failures += [failure] if failure else []
        notes += [note] if note else []
        return _Verified(
            pair, old, new, tuple(failures), tuple(dict.fromkeys((*said, *notes, *self._extras())))
        )

    def _built_size(self) -> tuple[int, int] | None:
        """(H, W) that the layer was built for, if the caller gave no size and its map is small."""
        built = (self.layer.get_build_config() or {}).get("input_shape")
        if self.options.size is None and isinstance(built, tuple | list) and len(built) == 4:
            height, width = built[1:3] if self.data_format == "channels_last" else built[2:]
            if isinstance(height, int) and isinstance(width, int) and height * width <= _MOST_POSITIONS:
                return height, width
        return None

    def _in_training(self, foreign: Foreign, asked: Question, *, pair: bool) -> tuple[str, str]:
        """A failure and a note from comparing the outputs in training. At least one of them is ""."""
        try:
            # Keras' own generator draws its first seed from Python's.
            with undrawn():
                also, theirs, _ = self._ask(foreign, asked, training=True)
        except PortError as error:
            return f"in training: {error}", ""
        if also != pair:
            kinds = ["(y, A)" if each else "y alone" for each in (pair, also)]
            return f"the old layer returns {kinds[0]} in evaluation, and {kinds[1]} in training", ""
        ours = self._answers(foreign, asked, pair=False, training=True)
        failure, note = self._differs_in_training(foreign, asked, theirs["y"], ours["y"])
        if failure and any(
            isinstance(e, keras.layers.SpectralNormalization) for e in everything_in(self.layer)
        ):
            return (
                "",
                "in training it overwrites its kernels (SpectralNormalization), and the new layer does not",
            )
        return failure, note

    def _extras(self) -> list[str]:
        """The arguments of the old layer's call besides x."""
        names = [*inspect.signature(self.layer.call).parameters.values()][1:]
        fixed = [each.name for each in names if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
        more = [name for name in fixed if name not in {"training", "return_attention_scores"}]
        if not more:
            return []
        return [
            f"its call takes {', '.join(more)} too, and the new one does not; change the code that passes them"
        ]

    def _ask(
        self, foreign: Foreign, asked: Question, *, training: bool = False
    ) -> tuple[bool, dict[str, Array], list[str]]:
        """Whether the old layer returns (y, A), its outputs and gradients, and notes about them."""
        dtype = str(asked.x.dtype)
        values = {
            place: value.astype(dtype) if np.issubdtype(value.dtype, np.floating) else value
            for place, value in self.values.items()
        }
        places = {id(each): place for place, each in enumerate(self.layer.variables)}
        x = self._maps(asked.x)
        try:
            with asked_in(self.layer, dtype):
                result, by_x, gradients, losses = ask(
                    self.layer, values, x, self._maps(asked.dy), training=training
                )
                parts = [np.asarray(keras.ops.convert_to_numpy(part)) for part in _parts(result)]
        except WrongResultError as error:
            raise PortError(
                f"{self.where}: returned {_shown(error.result)} for an input {x.shape}; expected y of the same shape, or (y, A)."
            ) from error
        except Exception as error:
            raise self._does_not_run(x.shape, _short(error)) from error
        found = {"y": self._positions(parts[0]), "x": self._positions(by_x)}
        notes = []
        if losses > (len(parts) if self.layer.activity_regularizer is not None else 0):
            notes.append("its call adds losses (add_loss), which the new layer does not")
        if len(parts) == 2:
            found["map"] = self._map(parts[1], foreign, asked)
            if parts[1].shape != found["map"].shape:
                notes.append(f"the old map had the shape {parts[1].shape}, and the new one has (B, N, M)")
        for name in foreign.origins:
            source = self.variables.get(foreign.source(name))
            if source is not None:
                found[name] = _canonical(gradients[places[id(source)]], name, foreign)
        return len(parts) == 2, found, notes

    def _answers(
        self, foreign: Foreign, asked: Question, *, pair: bool, training: bool = False
    ) -> dict[str, Array]:
        """The outputs and gradients of our layer."""
        dtype = str(asked.x.dtype)
        with keras.device("cpu"):
            twin = from_canonical(
                foreign.config,
                asked.params,
                block_size=self.options.block_size,
                data_format=self.data_format,
                dtype=dtype,
            )
        values = dict(enumerate(keras.ops.convert_to_numpy(each) for each in twin.variables))
        x, dy = self._maps(asked.x), self._maps(asked.dy)
        with asked_in(twin, dtype):
            y, by_x, gradients, _ = ask(twin, values, x, dy, training=training)
            found = {"y": self._positions(keras.ops.convert_to_numpy(y)), "x": self._positions(by_x)}
            if pair:
                _, attention = ask(twin, values, x, dy, return_attention_scores=True).result
                found["map"] = np.asarray(keras.ops.convert_to_numpy(attention))
        places = {id(each): place for place, each in enumerate(twin.variables)}
        for row in parameter_table(foreign.config).values():
            found[row.name] = gradients[places[id(variable(twin, row.name))]].reshape(row.shape)
        return found

    def _dressed(
        self, foreign: Foreign, *, pair: bool, dropped_map: bool
    ) -> tuple[SelfAttention2D, list[str]]:
        """Our layer with everything from the old one, and the notes about it."""
        like = next(
            self.variables[origin.sources[0]] for origin in foreign.origins.values() if origin.sources
        )
        policy = self.layer.dtype_policy
        if policy.variable_dtype != like.dtype:
            raise PortError(
                f"{self.where}: its variables are {like.dtype}, but its dtype policy {policy.name} has {policy.variable_dtype}; give it "
                "a policy with the dtype of its variables."
            )
        kind = SelfAttention2DWithMap if pair else SelfAttention2D
        place = like.value.device
        rules = self._rules(foreign)
        with undrawn(), keras.device(place if keras.backend.backend() == "jax" else str(place)):
            new = kind.from_spec(
                foreign.config,
                block_size=self.options.block_size,
                data_format=self.data_format,
                name=self.layer.name,
                dtype=policy,
                activity_regularizer=self.layer.activity_regularizer,
                **rules,
            )
            for name, array in foreign.params.items():
                target = variable(new, name)
                target.assign(np.array(array, order="C").reshape(target.shape))
        new.trainable = self.layer.trainable
        for name in parameter_table(foreign.config):
            sources = [self.variables[key] for key in foreign.origins[name].sources if key in self.variables]
            target = variable(new, name)
            target.trainable = target.trainable and any(source.trainable for source in sources)
        return new, notes_of(foreign, to_canonical(new), dropped_map=dropped_map)

    def _rules(self, foreign: Foreign) -> dict[str, Any]:
        """Constraints and regularizers of the variables, as arguments of our constructor.

        Raises:
            PortError: if the constructor cannot express them. It lists every one.
        """
        rules: dict[str, Any] = {}
        problems = []
        for part in ("kernel", "bias", "gamma"):
            names = [name for name in parameter_table(foreign.config) if name.rpartition(".")[2] == part]
            held = [
                (name, self.variables[key], foreign.source(name))
                for name in names
                for key in foreign.origins[name].sources
                if key in self.variables
            ]
            for rule in ("constraint", "regularizer"):
                found = [(name, getattr(each, rule), each, source) for name, each, source in held]
                said = {_described(value) for _, value, _, _ in found}
                given = [value for _, value, _, _ in found if value is not None]
                if not given:
                    continue
                shapes = all(
                    _own_shape(name, foreign) == tuple(each.shape) and source
                    for name, _, each, source in found
                )
                if len(said) == 1 and shapes:
                    rules[f"{part}_{rule}"] = given[0]
                else:
                    kinds = ", ".join(sorted({type(value).__name__ for value in given}))
                    why = "not the same everywhere" if len(said) > 1 else "for another shape than ours"
                    problems.append(f"the {rule} {kinds} of its {part}s is {why}")
        if problems:
            raise PortError(
                f"{self.where}: {'; '.join(problems)}, so the new layer cannot have it. Set it to None on these variables, and set the "
                "new layer's own afterwards."
            )
        return rules

    def _maps(self, array: Array) -> Array:
        last = self.data_format == "channels_last"
        return np.array(array if last else array.transpose(0, 3, 1, 2), order="C")

    def _positions(self, maps: Array) -> Array:
        maps = np.asarray(maps)
        return maps if self.data_format == "channels_last" else maps.transpose(0, 2, 3, 1)


def _without_zeros(layer: Any) -> dict[int, Array]:
    """The values of its variables, by place, with random values in place of zeros.

    A gamma of 0, or a last kernel or batch norm that starts at zero, would hide everything else that the layer computes.
    """
    generator = np.random.Generator(np.random.PCG64(0))
    values = {}
    for place, each in enumerate(layer.variables):
        value = np.array(widen(np.asarray(keras.ops.convert_to_numpy(each))))
        if np.issubdtype(value.dtype, np.floating) and not value.any():
            value = (0.7 + 0.3 * generator.standard_normal(value.shape)).astype(value.dtype)
        values[place] = value
    return values


def _canonical(gradient: Array, name: str, foreign: Foreign) -> Array:
    """A gradient of a variable, in the canonical form of that variable."""
    turned = [step.split()[0] for step in foreign.origins[name].steps if step.endswith("→ (C_in, C_out)")]
    matrix = to_matrix(gradient, turned[0]) if turned else gradient
    return matrix.reshape(foreign.params[name].shape)


def _own_shape(name: str, foreign: Foreign) -> tuple[int, ...]:
    """The shape that our layer stores a parameter in."""
    shape = foreign.params[name].shape
    return (
        (1, 1, *shape)
        if name.rpartition(".")[0] in projections(foreign.config) and len(shape) == 2
        else shape
    )


def _described(rule: Any) -> str:
    """A text for a constraint or a regularizer. Equal ones have equal texts."""
    config = rule.get_config() if hasattr(rule, "get_config") else id(rule)
    return "" if rule is None else f"{type(rule).__module__}.{type(rule).__qualname__} {config}"


def _parts(result: Any) -> list[Any]:
    parts = list(result) if isinstance(result, tuple | list) else [result]
    if len(parts) > 2 or not all(keras.ops.is_tensor(part) for part in parts):
        raise WrongResultError(result)
    return parts


def _short(error: Exception) -> str:
    """An error of Keras in one line, without colours."""
    text = " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).split())
    return f"{type(error).__name__}: {text if len(text) < 400 else text[:400] + ' …'}"


def _shown(value: Any) -> str:
    if keras.ops.is_tensor(value):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"({', '.join(_shown(each) for each in value)})"
    return f"a {type(value).__name__}"
