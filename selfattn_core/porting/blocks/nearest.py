"""Describes a file that no dialect fits: the nearest dialects, and tensors that could be an attention layer.

Shapes show which kernels exist, but not what they do: query and key have equal shapes. So no port uses this module. It writes
a dialect file with a question for every open choice, and that file is refused until all questions are answered.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from selfattn_core.porting.blocks.find import shown
from selfattn_core.porting.blocks.keys import KeyIndex
from selfattn_core.porting.blocks.match import filled, match
from selfattn_core.porting.blocks.plan import Listed
from selfattn_core.porting.dialects.catalogue import dialect, dialect_names
from selfattn_core.porting.dialects.dialect import Dialect
from selfattn_core.porting.report import listed

__all__ = ["Group", "Nearest", "as_lines", "groups", "nearest"]

_MOST = 3
_MOST_GROUPS = 4
# Levels between a layer's prefix and its kernels: `theta.conv.parametrizations.weight.original` has five.
_LEVELS = 5
_AXES = {4: ("OIHW", "HWIO"), 3: ("OIL", "LIO"), 2: ("OI", "IO")}

# The names of kernel, u and v where PyTorch stores spectral norm. Sigma is uᵀWv of them.
_NORMS = (
    ("weight_orig", "weight_u", "weight_v"),
    ("parametrizations/weight/original", "parametrizations/weight/0/_u", "parametrizations/weight/0/_v"),
)


@dataclass(frozen=True)
class Nearest:
    """A dialect that has some of its keys in the file.

    Args:
        dialect: its name.
        title: its description in a few words.
        prefix: the prefix of the keys, in the file's own spelling.
        found: the number of its keys in the file.
        missing: the first missing key, or "".
        unused: the first key under the prefix that it does not read, or "".
    """

    dialect: str
    title: str
    prefix: str
    found: int
    missing: str
    unused: str


@dataclass(frozen=True)
class Group:
    """Tensors under one prefix whose shapes could be such a layer.

    Args:
        prefix: the beginning of their keys, in the file's own spelling.
        kernels: keys of the 1×1 kernels under the prefix, and (C_in, C_out) of each.
        numbers: keys of the tensors with one element. One of them could be gamma.
        others: keys that the shapes do not explain.
        questions: the questions that only the code of the network answers.
        toml: a dialect file with everything that the shapes show. A value "?" is an open question.
    """

    prefix: str
    kernels: dict[str, tuple[int, int]]
    numbers: tuple[str, ...]
    others: tuple[str, ...]
    questions: tuple[str, ...]
    toml: str


def nearest(index: KeyIndex) -> list[Nearest]:
    """The dialects with two or more of their kernels under one prefix, best first.

    Example:
        >>> index = KeyIndex(["a.theta.weight", "a.phi.weight", "a.gg.weight", "a.gamma"])
        >>> [(one.dialect, one.missing) for one in nearest(index)][:1]
        [('biggan', 'g/weight')]
    """
    found: dict[str, tuple[tuple[int, int, int], Nearest]] = {}
    for name in dialect_names():
        chosen = dialect(name)
        for prefix in _places(chosen, index):
            matched = match(chosen, index, prefix)
            there = len(matched.projections)
            distance = (-there, len(matched.missing), len(matched.unused))
            one = Nearest(
                name,
                chosen.title,
                shown(prefix, index),
                there + bool(matched.gamma),
                next(iter(matched.missing), ""),
                next(iter(matched.unused), ""),
            )
            if there >= 2 and (name not in found or distance < found[name][0]):
                found[name] = (distance, one)
    return [one for _, one in sorted(found.values(), key=lambda pair: pair[0])][:_MOST]


def _places(chosen: Dialect, index: KeyIndex) -> list[str]:
    """The prefixes that have at least one kernel of the dialect."""
    places: dict[str, None] = {}
    for variant in chosen.variants:
        for path in variant.roles.values():
            for form in chosen.kernels:
                places |= dict.fromkeys(index.prefixes_of(filled(form.kernel, path=path)))
    return list(places)


def groups(index: KeyIndex, infos: Mapping[str, Listed]) -> list[Group]:
    """Groups of tensors whose shapes could be an attention layer, in the order of their prefixes.

    Args:
        index: the keys of the file.
        infos: shapes and dtypes by key.

    Example:
        >>> from selfattn_core.porting.formats import TensorInfo
        >>> shapes = {"a.one": (2, 16, 1, 1), "a.two": (2, 16, 1, 1), "a.three": (16, 16, 1, 1), "a.gain": (1,)}
        >>> infos = {name: TensorInfo(shape, "float32") for name, shape in shapes.items()}
        >>> [(group.prefix, list(group.kernels), group.numbers) for group in groups(KeyIndex(infos), infos)]
        [('a.', ['a.one', 'a.three', 'a.two'], ('a.gain',))]
    """
    by_prefix: dict[str, list[str]] = {}
    for name in index.under(""):
        if _axes(infos[index.original(name)]):
            parts = name.split("/")
            for length in range(max(0, len(parts) - 1 - _LEVELS), len(parts)):
                prefix = "/".join(parts[:length]) + "/" if length else ""
                by_prefix.setdefault(prefix, []).append(name)
    found: list[Group] = []
    inside: list[str] = []
    for prefix in sorted(by_prefix, key=lambda prefix: (-prefix.count("/"), prefix)):
        names = by_prefix[prefix]
        if not 3 <= len(names) <= 4 or any(one.startswith(prefix) for one in inside):
            continue
        layouts = _axes(infos[index.original(names[0])])
        fits = [
            axes for axes in layouts if _Shapes(index, infos, prefix, names, axes).group(other_axes=False)
        ]
        if fits:
            inside.append(prefix)
            group = _Shapes(index, infos, prefix, names, fits[0]).group(other_axes=len(fits) > 1)
            found += [group] if group else []
        if len(found) == _MOST_GROUPS:
            break
    return sorted(found, key=lambda group: group.prefix)


def _is_float(info: Listed) -> bool:
    return info.dtype.startswith(("float", "bfloat"))


def _axes(info: Listed) -> tuple[str, ...]:
    """The possible orders of axes of a 1×1 kernel of this shape. Empty if it is not such a kernel."""
    shape = info.shape
    if not _is_float(info) or max(shape, default=0) < 2:
        return ()
    if len(shape) == 2:
        return _AXES[2] if min(shape) > 1 else ()
    if len(shape) not in _AXES:
        return ()
    return tuple(
        axes
        for axes in _AXES[len(shape)]
        if all(size == 1 for size, axis in zip(shape, axes, strict=True) if axis not in "OI")
    )


class _Shapes:
    """The 1×1 kernels under one prefix, in one order of axes. Names are without the prefix."""

    def __init__(
        self, index: KeyIndex, infos: Mapping[str, Listed], prefix: str, names: list[str], axes: str
    ) -> None:
        self.index, self.infos, self.prefix, self.axes = index, infos, prefix, axes
        self.names = [name.removeprefix(prefix) for name in names]
        self.rest = [name for name in index.under(prefix) if name not in self.names]
        self.separator = "/" if "/" in index.original(prefix + self.names[0]) else "."
        self.ending = self._ending()
        self.paths = {name: name.removesuffix(f"/{self.ending}") for name in self.names}
        self.explained: set[str] = set()

    def group(self, *, other_axes: bool) -> Group | None:
        """The group and its dialect file. None if the widths are not an attention layer's, or if there are larger kernels too."""
        widths = {name: self._widths(name) for name in self.names}
        roles = _possible(widths)
        if not roles or any(sum(size > 1 for size in self._info(name).shape) > 1 for name in self.rest):
            return None
        numbers = [
            name
            for name in self.rest
            if math.prod(self._info(name).shape) == 1
            and _is_float(self._info(name))
            and "/bias" not in f"/{name}"
        ]
        if not numbers and (len(self.axes) == 2 or len({*widths.values()}) == 1):
            # Without this, any three layers of equal widths would be a group.
            return None
        questions: list[str] = []
        toml = [
            'name = "mine"',
            'title = "my layer"',
            'source = "my code"',
            f'layout = "{"BHWC" if self.axes in ("HWIO", "LIO", "IO") else "BCHW"}"',
            *self._layer(roles),
            *self._roles(roles, questions),
            *self._gamma(numbers, questions),
            *self._kernels(),
        ]
        questions.append(
            "does the code multiply the scores, for example by 1/sqrt of a width? If so, add a table [scale] with factor = "
            '"qk_channels^-0.5"'
        )
        if other_axes:
            questions.append(
                f"is a kernel (C_out, C_in) or (C_in, C_out)? Set axes to {' or '.join(_AXES[len(self.axes)])}"
            )
        others = [name for name in self.rest if name not in self.explained and name not in numbers]
        if others:
            questions.append(
                f"what do these tensors do? A port is refused while they are unused: {listed(self._originals(others), 6)}"
            )
        return Group(
            shown(self.prefix, self.index),
            dict(zip(self._originals(self.names), widths.values(), strict=True)),
            self._originals(numbers),
            self._originals(others),
            tuple(questions),
            "\n".join(toml) + "\n",
        )

    def _info(self, name: str) -> Listed:
        return self.infos[self.index.original(self.prefix + name)]

    def _originals(self, names: list[str]) -> tuple[str, ...]:
        return tuple(self.index.original(self.prefix + name) for name in names)

    def _widths(self, name: str) -> tuple[int, int]:
        shape = self._info(name).shape
        same = len(shape) == len(self.axes)
        return (shape[self.axes.index("I")], shape[self.axes.index("O")]) if same else (0, 0)

    def _ending(self) -> str:
        """The ending that the names of all kernels share."""
        parts = [name.split("/") for name in self.names]
        shared = 0
        while shared < min(map(len, parts)) - 1 and len({tuple(part[-shared - 1 :]) for part in parts}) == 1:
            shared += 1
        return "/".join(parts[0][len(parts[0]) - shared :])

    def _key(self, *parts: str) -> str:
        return "/".join(part for part in parts if part).replace("/", self.separator)

    def _layer(self, roles: Mapping[str, list[str]]) -> list[str]:
        biases = self._biases()
        bare = [role for role, names in roles.items() if biases and not any(name in biases for name in names)]
        return [
            "",
            "[layer]",
            f"out_projection = {str('out' in roles).lower()}",
            f"use_bias = {str(bool(biases)).lower()}",
            *([f"bias_free = [{', '.join(map(_quoted, bare))}]"] if bare else []),
            "kv_pool = 1  # 2 if the code pools key and value. No tensor shows it",
            "kv_pool_stored = false",
        ]

    def _roles(self, roles: Mapping[str, list[str]], questions: list[str]) -> list[str]:
        found = ["", "[roles]"]
        for role, names in roles.items():
            choices = [_quoted(self._key(self.paths[name])) for name in names]
            if len(choices) == 1:
                found.append(f"{role} = {choices[0]}")
            else:
                found.append(f'{role} = "?"  # {" or ".join(choices)}: {_ASKED[role]}')
        undecided = [role for role, names in roles.items() if len(names) > 1]
        if undecided:
            questions.append(
                f"which one acts as {', '.join(undecided)}? Their kernels have equal shapes, and names prove nothing. The query "
                f"is the one {_ASKED['query']}"
            )
        return found

    def _gamma(self, numbers: list[str], questions: list[str]) -> list[str]:
        keys = [_quoted(self._key(name)) for name in numbers]
        if len(keys) == 1:
            return ["", "[gamma]", f"key = {keys[0]}"]
        if keys:
            questions.append(f"which one is the gain of the residual? {', '.join(keys)}")
            return ["", "[gamma]", f'key = "?"  # {" or ".join(keys)}']
        questions.append(
            "where is the gain of the residual? The file has no single number. Write value = 1.0 if the code has no gain, or "
            'key = "gamma" and saved = false if the gain is a plain tensor, which no file holds'
        )
        return ["", "[gamma]", 'key = "?"  # or write value = 1.0 instead, if the code has no gain']

    def _kernels(self) -> list[str]:
        found = ["", "[[kernels]]", f'axes = "{self.axes}"', f'kernel = "{self._key("{path}", self.ending)}"']
        biases = self._biases()
        for name, tail in biases.items():
            self.explained.add(self._beside(name, tail))
        if biases:
            found.append(f'bias = "{self._key("{path}", next(iter(biases.values())))}"')
        for kernel, u, v in _NORMS:
            vectors = [self._beside(name, part) for name in self.names for part in (u, v)]
            if self.ending == kernel and all(self.prefix + name in self.index for name in vectors):
                self.explained |= set(vectors)
                found += [
                    "",
                    "[kernels.spectral_norm]",
                    f'u = "{self._key("{path}", u)}"',
                    f'v = "{self._key("{path}", v)}"',
                    'sigma = "stored"',
                ]
        return found

    def _beside(self, name: str, tail: str) -> str:
        return f"{self.paths[name]}/{tail}"

    def _biases(self) -> dict[str, str]:
        """The ending of the key of a bias, by kernel. All kernels that have a bias share it."""
        parts = self.ending.split("/")[:-1] if self.ending else []
        for length in range(len(parts), -1, -1):
            for leaf in ("bias", "b"):
                tail = "/".join((*parts[:length], leaf))
                found = {
                    name: tail for name in self.names if self.prefix + self._beside(name, tail) in self.index
                }
                shapes = [
                    self._info(self._beside(name, tail)).shape == self._widths(name)[1:] for name in found
                ]
                if found and self.ending and all(shapes):
                    return found
        return {}


def _possible(widths: Mapping[str, tuple[int, int]]) -> dict[str, list[str]]:
    """The names that could have each role, judging by (C_in, C_out). Empty if the kernels are not an attention layer."""
    roles = ("query", "key", "value", "out")[: len(widths)]
    found: dict[str, dict[str, None]] = {role: {} for role in roles}
    for names in itertools.permutations(widths):
        query, key, value, *rest = (widths[name] for name in names)
        channels, narrow = query
        # Without an out projection the layer adds the value to the feature map.
        (out,) = rest or [(channels, channels)]
        if query == key and narrow <= channels == value[0] == out[1] and out[0] == value[1]:
            for role, name in zip(roles, names, strict=True):
                found[role][name] = None
    return {role: sorted(names) for role, names in found.items() if names}


_ASKED = {
    "query": "whose positions are the rows, so that the softmax sums to 1 over the positions of the other",
    "key": "the other one",
    "value": "the one that the map is multiplied by",
    "out": "the last one",
}


def _quoted(text: str) -> str:
    return f'"{text}"'


def as_lines(near: Sequence[Nearest], found: Sequence[Group]) -> Iterator[str]:
    """Both as lines of text."""
    for one in near:
        differing = f"missing: {one.missing}" if one.missing else f"unused: {one.unused}"
        yield f"  near    {one.dialect}: {one.title}, at {one.prefix or 'the top of the file'}, {differing}"
    for group in found:
        yield f"could be an attention layer, judging by its shapes: {group.prefix or 'the top of the file'}"
        for key, (fan_in, fan_out) in group.kernels.items():
            yield f"  {key}: {fan_in} → {fan_out} channels"
        yield from (f"  {key}: one number" for key in group.numbers)
        yield from (f"  ? {question}" for question in group.questions)
        yield '  Its dialect file, for `--from mine.toml` when every "?" is answered:'
        yield from (f"    {line}".rstrip() for line in group.toml.splitlines())
