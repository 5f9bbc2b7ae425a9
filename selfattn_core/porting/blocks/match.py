"""Finds the tensors of a dialect in a file by whole sets of keys under one prefix, never by order or shape."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from selfattn_core.porting.blocks.keys import KeyIndex
from selfattn_core.porting.dialects.dialect import Dialect, KernelForm, Telltale, Variant

__all__ = ["Match", "Projection", "filled", "match", "prefixes"]


@dataclass(frozen=True)
class Projection:
    """The keys of one role, in the file's own spelling. A key that the file does not have is "".

    Args:
        role: "query", "key", "value" or "out".
        form: the way in which it is stored.
        kernel: the key of the kernel.
        bias: the key of the bias.
        u: the key of spectral norm's vector u.
        v: the key of spectral norm's vector v.
    """

    role: str
    form: KernelForm
    kernel: str
    bias: str
    u: str = ""
    v: str = ""


@dataclass(frozen=True)
class Match:
    """What a dialect finds under a prefix.

    Args:
        dialect: the dialect.
        prefix: the prefix in the form of `normal`. It is "" or ends with "/".
        variant: the variant that fits best.
        projections: the projections whose keys are complete, by role.
        gamma: the key of gamma, "" if it is not in the file.
        batch_norm: keys by part ("weight", "bias", "mean", "var").
        averaged: whether kernels, biases and gamma are the averaged copies.
        averages: whether the file has averaged copies.
        missing: names under the prefix that the dialect needs and the file lacks.
        unused: keys under the prefix that the dialect does not read.
        ignored: keys under the prefix that do not change the function.
        used: keys that the dialect reads or requires.
        telltales: the telltales that show another function.
        ambiguous: names of other variants that fit equally well.
    """

    dialect: Dialect
    prefix: str
    variant: Variant
    projections: Mapping[str, Projection]
    gamma: str
    batch_norm: Mapping[str, str]
    averaged: bool
    averages: bool
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    ignored: tuple[str, ...]
    used: tuple[str, ...]
    telltales: tuple[Telltale, ...]
    ambiguous: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether the file has everything that the dialect needs."""
        return not self.missing and not self.telltales

    @property
    def fits(self) -> bool:
        """Whether the keys are exactly the dialect's."""
        return self.whole and not self.unused and not self.ambiguous


def prefixes(dialect: Dialect, index: KeyIndex) -> list[str]:
    """Every prefix that has the query, key and value kernels of a dialect.

    Example:
        >>> from selfattn_core.porting.dialects.catalogue import dialect
        >>> index = KeyIndex([f"d.attn.{name}.weight" for name in ("theta", "phi", "g", "o")])
        >>> prefixes(dialect("biggan"), index)
        ['d/attn/']
    """
    found: dict[str, None] = {}
    for variant in dialect.variants:
        sets = []
        for role in ("query", "key", "value"):
            here = set()
            for form in dialect.kernels:
                for ending in ("", *dialect.ema):
                    kernel = filled(form.kernel + ending, path=variant.roles.get(role, ""))
                    here.update(index.prefixes_of(kernel))
            sets.append(here)
        if sets and variant.roles:
            found |= dict.fromkeys(sorted(set.intersection(*sets)))
    return list(found)


def match(dialect: Dialect, index: KeyIndex, prefix: str, *, averaged: bool | None = None) -> Match:
    """What a dialect finds under a prefix, in its best variant.

    Args:
        dialect: a dialect with keys.
        index: the keys of the file.
        prefix: the prefix in the form of `normal`.
        averaged: whether to prefer averaged copies, if there are any. The dialect has the default.
    """
    prefer = dialect.ema_first if averaged is None else averaged
    found = [_Matcher(dialect, variant, index, prefix, prefer).match() for variant in dialect.variants]

    def distance(candidate: Match) -> tuple[int, int]:
        return len(candidate.missing), len(candidate.unused)

    best = min(found, key=distance)
    others = [
        other for other in found if other is not best and best.whole and distance(other) == distance(best)
    ]
    if others:
        best = Match(**{**vars(best), "ambiguous": tuple(other.variant.name for other in others)})
    return best


def filled(pattern: str, *, path: str = "", prefix: str = "") -> str:
    """A pattern as a name in the form of `normal`. A whole key keeps its leading "//"."""
    bare = prefix.rstrip("/")
    text = (
        pattern.replace("{prefix}", bare).replace("{module}", bare.partition("/")[2]).replace("{path}", path)
    )
    name = "/".join(part for part in text.replace(".", "/").split("/") if part)
    return f"//{name}" if pattern.startswith("//") else name


@dataclass(frozen=True)
class _Try:
    """One role in one form: names by part, names that the file lacks, and full names that are read or ignored."""

    form: KernelForm
    names: Mapping[str, str]
    lacking: list[str]
    used: set[str]
    ignored: set[str]


class _Matcher:
    def __init__(
        self, dialect: Dialect, variant: Variant, index: KeyIndex, prefix: str, averaged: bool
    ) -> None:
        self.dialect = dialect
        self.variant = variant
        self.index = index
        self.prefix = prefix
        self.used: set[str] = set()
        self.ignored: set[str] = set()
        self.missing: list[str] = []
        self.averages = self._averages()
        self.ending = self.averages if averaged else ""

    def match(self) -> Match:
        variant = self.variant
        projections = {}
        for role in self._roles():
            if projection := self._projection(role):
                projections[role] = projection
        gamma = next((key for name in self.dialect.gamma_keys if (key := self._find(name + self.ending))), "")
        if self.dialect.gamma_keys and not gamma and self.dialect.gamma_saved:
            self.missing.append(self.dialect.gamma_keys[0])
        batch_norm = {}
        if variant.batch_norm:
            names = {part: getattr(variant.batch_norm, part) for part in ("weight", "bias", "mean", "var")}
            batch_norm = {part: self._need(name) for part, name in names.items() if name}
        for name in self.dialect.requires:
            self._need(name)
        here = self.index.under(self.prefix)
        rest = [name for name in here if self.prefix + name not in self.used]
        ignored = [name for name in rest if self._is_ignored(name)]
        unused = [name for name in rest if not self._is_ignored(name)]
        return Match(
            self.dialect,
            self.prefix,
            variant,
            projections,
            gamma,
            batch_norm,
            bool(self.ending),
            bool(self.averages),
            tuple(dict.fromkeys(self.missing)),
            self._originals(unused),
            self._originals(ignored),
            tuple(self.index.original(name) for name in sorted(self.used) if name.startswith(self.prefix)),
            tuple(telltale for telltale in self.dialect.telltales if self._shows(telltale, here)),
        )

    def _averages(self) -> str:
        """The suffix of the averaged copies in the file, "" if there are none."""
        for suffix in self.dialect.ema:
            for form in self.dialect.kernels:
                name = filled(form.kernel + suffix, path=self.variant.roles.get("query", ""))
                if self.prefix + name in self.index:
                    return suffix
        return ""

    def _roles(self) -> list[str]:
        roles = [role for role in ("query", "key", "value") if role in self.variant.roles]
        if self.variant.out_projection or (self.variant.out_projection is None and self._has_out()):
            roles.append("out")
        return roles

    def _has_out(self) -> bool:
        return any(
            self.prefix + filled(form.kernel, path=self.variant.roles["out"]) in self.index
            for form in self.dialect.kernels
        )

    def _projection(self, role: str) -> Projection | None:
        """The role in the form whose keys are in the file. Of several forms, the one that explains most keys."""
        tries = [self._try(role, form) for form in self.dialect.kernels]
        whole = [found for found in tries if not found.lacking]
        if not whole:
            self.missing += [name.removeprefix("//") for name in min((t.lacking for t in tries), key=len)]
            return None
        best = max(whole, key=lambda found: len(found.used | found.ignored))
        self.used |= best.used
        self.ignored |= best.ignored
        keys = {part: self.index.original(self._absolute(name)) for part, name in best.names.items()}
        return Projection(
            role, best.form, keys["kernel"], keys.get("bias", ""), keys.get("u", ""), keys.get("v", "")
        )

    def _try(self, role: str, form: KernelForm) -> "_Try":
        needed = {"kernel": form.kernel + self.ending}
        bias_wanted = self.variant.use_bias is not False and role not in self.variant.bias_free
        if bias_wanted and (self.variant.use_bias or self._has_biases()):
            needed["bias"] = form.bias + self.ending
        if form.spectral_norm:
            needed["u"] = form.spectral_norm.u
            if form.spectral_norm.v:
                needed["v"] = form.spectral_norm.v
        needed |= {f"required {number}": pattern for number, pattern in enumerate(form.requires)}
        path = self.variant.roles[role]
        names = {part: filled(pattern, path=path, prefix=self.prefix) for part, pattern in needed.items()}
        lacking = [name for name in names.values() if self._absolute(name) not in self.index]
        extra = {self._absolute(filled(pattern, path=path, prefix=self.prefix)) for pattern in form.ignore}
        used = {self._absolute(name) for name in names.values()}
        return _Try(form, names, lacking, used, {name for name in extra if name in self.index})

    def _has_biases(self) -> bool:
        """Whether the query has a bias, in any form."""
        path = self.variant.roles["query"]
        return any(
            self.prefix + filled(form.bias + self.ending, path=path) in self.index
            for form in self.dialect.kernels
            if form.bias
        )

    def _absolute(self, name: str) -> str:
        return name[2:] if name.startswith("//") else self.prefix + name

    def _find(self, name: str) -> str:
        absolute = self._absolute(filled(name, prefix=self.prefix))
        if absolute not in self.index:
            return ""
        self.used.add(absolute)
        return self.index.original(absolute)

    def _need(self, name: str) -> str:
        key = self._find(name)
        if not key:
            self.missing.append(filled(name, prefix=self.prefix).removeprefix("//"))
        return key

    def _is_ignored(self, name: str) -> bool:
        if self.prefix + name in self.ignored:
            return True
        if any(fnmatchcase(name, filled(pattern)) for pattern in self.dialect.ignore):
            return True
        # The other copy of a used tensor: the averaged copy of a raw one, or the reverse.
        absolute = self.prefix + name
        for suffix in self.dialect.ema:
            tail = f"/{filled(suffix)}"
            plain = absolute.removesuffix(tail)
            if (
                plain != absolute and (plain in self.used or self._other(plain))
            ) or absolute + tail in self.used:
                return True
        return False

    def _other(self, plain: str) -> bool:
        return any(f"{plain}/{filled(suffix)}" in self.used for suffix in self.dialect.ema)

    def _shows(self, telltale: Telltale, here: list[str]) -> bool:
        def present(pattern: str) -> bool:
            return any(fnmatchcase(name, filled(pattern)) for name in here)

        if telltale.beside and not present(telltale.beside):
            return False
        return present(telltale.key) != telltale.missing

    def _originals(self, names: list[str]) -> tuple[str, ...]:
        return tuple(self.index.original(self.prefix + name) for name in names)
