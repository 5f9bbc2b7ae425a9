"""Dialects: what a published implementation calls its tensors, and what it computes with them.

A dialect is a TOML file. Those in `data/` are built in; `selfattn dialects NAME` prints one to start your own from.
All that a file may hold:

```toml
name = "my-layer"                    # required
title = "my model's attention"       # required: what it is, in a few words
source = "https://…"                 # required: where the implementation is
layout = "BCHW"                      # required: of its feature maps; or "BHWC"
prefixes = ["generator.attn."]       # where its keys usually begin
caveats = ["…"]                      # what a person must know; said in every report
ignore = ["*.num_batches_tracked"]   # keys (globs under the prefix) that say nothing about the function
requires = ["norm.weight"]           # keys that must be there though nothing reads them
spectral_norm_always = true          # the class cannot be had without spectral norm

[layer]                              # the layer it is; widths are read from the kernels
out_projection = false               # or "stored": whatever the file has
use_bias = true                      # or "stored"
bias_free = ["out"]                  # roles without a bias where the others have one
kv_pool = 1
kv_pool_stored = true                # false: nothing tells, so it is an assumption that `--set kv_pool=2` changes
qk_channels = "channels//8"          # what the original makes of `channels`, if it can make nothing else
value_channels = "channels"
widths_required = false              # true: other widths mean another implementation

[roles]                              # required: what the projection that ACTS as each role is called
query = "f"
key = "g"
value = "h"
out = "o"                            # where there is one

[gamma]                              # required: one of
key = "gamma"                        # its key; `saved = false`: usually not in files, then `--set gamma=…` is asked for
value = 1.0                          # the original has none and acts like this one

[[kernels]]                          # required: each way in which a projection is stored; the one that is there is taken
axes = "OIHW"                        # of the kernel: O and I, and letters HWL1 for axes of size 1
kernel = "{path}.weight_orig"        # {path}: the role's name
bias = "{path}.bias"
requires = ["…"]                     # must be there, is not read
ignore = ["{path}.sv0"]              # may be there, is not read

[kernels.spectral_norm]
u = "{path}.weight_u"
v = "{path}.weight_v"                # for sigma = "stored"
sigma = "stored"                     # uᵀWv as stored; or "iterate": power iteration from u first
side = "out"                         # u has C_out elements; "in": C_in; "shape": (1, C_out) or (C_in, 1), whichever it is
normalize = "max"                    # t/max(‖t‖, eps); "add": t/(‖t‖ + eps); "root-max": t/√max(Σt², eps); "root-add": t/√(Σt² + eps)
eps = 1e-12
iterations = 1

# spectral_norm = "torch" in [[kernels]], of a kernel that ends in "weight", stands for all ways in which PyTorch code stores
# it: plain; weight_orig, weight_u and weight_v; parametrizations.weight.…; the kernel itself beside weight_orig, as before
# torch 1.0; and module.weight_bar, module.weight_u and module.weight_v of the wrapper class SpectralNorm

[scale]                              # the scores are multiplied by
factor = "qk_channels^-0.5"          # or "channels^-0.5", or a number
setting = "use_scale"                # not in the file: `--set use_scale=false` makes the factor 1

[batch_norm]                         # over the output of the last projection, in evaluation mode
weight = "norm.weight"               # weight and bias may be absent
bias = "norm.bias"
mean = "norm.running_mean"
var = "norm.running_var"
eps = 1e-5

[ema]                                # averaged copies of kernels, biases and gamma, which the original evaluates with;
suffixes = ["/ema_0.9999"]           # `--set ema=false` takes the others. TensorFlow's /ExponentialMovingAverage are known without
                                     # this table, and taken with `--set ema=true`

[[variants]]                         # the same with changes; the one whose keys are there is taken
name = "with pooling"
roles = { key = "g.0", value = "h.0" }
kv_pool = 2                          # and out_projection, use_bias, bias_free, [variants.batch_norm] or batch_norm = false

[[telltales]]                        # a key that shows another function
key = "concat_project.*"             # or `missing = "…"`, and then `beside = "…"`: only where this is there
reason = "…"

[refusal]                            # the layer cannot be expressed
reason = "…"
instead = "…"
```

In a pattern `.` and `/` are the same, and so they are in a file. `{prefix}` is the block's prefix, `{module}` the prefix without
its first part, and a pattern that begins with `//` is a whole key, for example `//batch_stats/{module}/{path}/u`.
"""

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from selfattn_core.files.text import read_text
from selfattn_core.porting.dialects.toml_table import TomlTable
from selfattn_core.porting.errors import PortError
from selfattn_core.problems import Problem

__all__ = [
    "ROLES",
    "BatchNorm",
    "Dialect",
    "KernelForm",
    "SpectralNorm",
    "Telltale",
    "Variant",
    "dialect",
    "dialect_names",
    "parse_dialect",
]

ROLES = ("query", "key", "value", "out")
# Bytes. A dialect has a few thousand.
_LARGEST_FILE = 2**20
_WIDTH = re.compile(r"channels(?://([1-9]\d*))?")
_POWER = re.compile(r"(channels|qk_channels)\^(-?\d+(?:\.\d+)?)")
# What stands for every way in which PyTorch code stores a kernel.
_TORCH = "torch"
_AVERAGES = ("/ExponentialMovingAverage",)
_PLACEHOLDER = re.compile(r"\{[^}]*\}?|\}")


@dataclass(frozen=True)
class SpectralNorm:
    """How the original makes sigma from what it stores; its kernel acts divided by sigma.

    Args:
        u: pattern of the key of the stored vector.
        v: pattern of the other one, "" if it is not used.
        sigma: "stored" or "iterate".
        side: the axis of the kernel that u belongs to, "out", "in" or, by u's own shape, "shape".
        normalize: "max", "add", "root-max" or "root-add", the rule that keeps a division by zero away.
        eps: of that rule.
        iterations: power iterations from the stored u.
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
    """One way in which a projection is stored."""

    kernel: str
    bias: str
    axes: str
    requires: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    spectral_norm: SpectralNorm | None = None


@dataclass(frozen=True)
class BatchNorm:
    """Keys of a batch norm over the output of the last projection; weight and bias may be ""."""

    weight: str
    bias: str
    mean: str
    var: str
    eps: float


@dataclass(frozen=True)
class Variant:
    """One set of keys of a dialect; None in a switch means what the file shows."""

    name: str
    roles: Mapping[str, str]
    out_projection: bool | None
    use_bias: bool | None
    bias_free: tuple[str, ...]
    kv_pool: int
    batch_norm: BatchNorm | None


@dataclass(frozen=True)
class Telltale:
    """A key whose presence, or absence, shows that the file belongs to another function."""

    key: str
    missing: bool
    reason: str
    beside: str = ""


@dataclass(frozen=True)
class Dialect:
    """One implementation, as the module's docstring describes; `text` is the file it comes from."""

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
        """Whether the layer is known and cannot be expressed."""
        return bool(self.reason)

    def scale_factor(self, channels: int, qk_channels: int) -> float:
        """What the scores are multiplied by in a layer of these widths.

        Example:
            >>> dialect("timm").scale_factor(64, 8)
            0.125
        """
        if not isinstance(self.scale, str):
            return self.scale
        base, exponent = _POWER.fullmatch(self.scale).groups()  # type: ignore[union-attr]
        return float({"channels": channels, "qk_channels": qk_channels}[base] ** float(exponent))

    def widths(self, channels: int) -> dict[str, int]:
        """The widths that the original makes for a map of so many channels, where it has no choice.

        Example:
            >>> dialect("biggan").widths(64)
            {'qk_channels': 8, 'value_channels': 32}
        """
        found = {}
        for name, rule in (("qk_channels", self.qk_channels), ("value_channels", self.value_channels)):
            if rule:
                found[name] = channels // int(_WIDTH.fullmatch(rule).group(1) or 1)  # type: ignore[union-attr]
        return found


def dialect_names() -> list[str]:
    """Every built-in dialect, ours first.

    Example:
        >>> dialect_names()[:4]
        ['canonical', 'torch', 'keras', 'flax']
    """
    ours = ["canonical", "torch", "keras", "flax"]
    names = [path.name.removesuffix(".toml") for path in _data().iterdir() if path.name.endswith(".toml")]
    return ours + sorted(set(names) - set(ours))


def dialect(name: str) -> Dialect:
    """A built-in dialect by its name, or your own from a TOML file.

    Args:
        name: as `dialect_names` lists them, or a path that ends in ".toml".

    Raises:
        PortError: if there is no such dialect, or the file is not a whole and consistent one (lists every problem).

    Example:
        >>> dialect("deoldify").variants[0].roles["query"]
        'key'
        >>> dialect("fastia")
        Traceback (most recent call last):
        ...
        selfattn_core.porting.errors.PortError: dialect 'fastia' is unknown; did you mean fastai or fastai-1? `selfattn dialects` lists them, and a file of your own ends in .toml.
    """
    if name.endswith(".toml"):
        return parse_dialect(_read(Path(name)), name)
    known = dialect_names()
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise PortError(
            f"dialect {name!r} is unknown; {hint}`selfattn dialects` lists them, and a file of your own ends in .toml.",
            kind="unknown_dialect",
            names=near,
        )
    return _built_in(name)


@cache
def _built_in(name: str) -> Dialect:
    return parse_dialect((_data() / f"{name}.toml").read_text(encoding="utf-8"), name)


def _data() -> Any:
    return resources.files("selfattn_core.porting.dialects") / "data"


def _read(path: Path) -> str:
    if path.is_dir():
        raise PortError(f"{path}: cannot be read as a dialect: it is a folder.")
    if not path.exists():
        raise PortError(f"{path}: cannot be read as a dialect: no such file.")
    try:
        return read_text(path, most=_LARGEST_FILE)
    except (OSError, ValueError) as error:
        raise PortError(
            f"cannot be read as a dialect: {error} (a dialect has a few thousand bytes of TOML in UTF-8)"
        ) from error


def parse_dialect(text: str, where: str) -> Dialect:
    """A dialect from the text of its file.

    Args:
        text: TOML, as the module's docstring describes.
        where: the file's name, for messages.

    Raises:
        PortError: if it is not TOML, or not a whole and consistent dialect; lists every problem.

    Example:
        >>> parse_dialect(dialect("biggan").text, "mine.toml").title == dialect("biggan").title
        True
    """
    try:
        content = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise PortError(f"{where}: is not TOML: {error}") from error
    except ValueError as error:
        # What Python says of it is advice for a programmer.
        raise PortError(f"{where}: holds a number with thousands of digits.") from error
    problems: list[str] = []
    parsed = _Parser(TomlTable(content, "", problems)).parse(text)
    if problems:
        reasons = [Problem("bad_dialect", problem) for problem in problems]
        raise PortError.of(f"{where}: is not a dialect that can be used:", reasons)
    return parsed


class _Parser:
    """Reads the tables of one file; problems go to the list that they share."""

    def __init__(self, top: TomlTable) -> None:
        self.top = top

    def parse(self, text: str) -> Dialect:
        top = self.top
        refusal = top.table("refusal")
        reason = refusal.text("reason", required=True) if refusal else ""
        instead = refusal.text("instead", required=True) if refusal else ""
        if refusal:
            refusal.finish()
        scale, setting = self._scale()
        gamma_keys, gamma_value, gamma_saved = self._gamma(refused=refusal is not None)
        kernels = tuple(form for table in top.tables("kernels") for form in self._kernels(table))
        layer = top.table("layer") or TomlTable({}, "layer.", top.problems)
        variants = self._variants(layer, refused=refusal is not None)
        qk_channels, value_channels = (self._width(layer, name) for name in ("qk_channels", "value_channels"))
        ema = top.table("ema")
        suffixes = ema.texts("suffixes") if ema else ()
        if ema:
            ema.finish()
        found = Dialect(
            name=top.text("name", required=True),
            title=top.text("title", required=True),
            source=top.text("source", required=True),
            layout=top.text("layout", required=True, choices=("BCHW", "BHWC")),
            prefixes=top.texts("prefixes"),
            caveats=top.texts("caveats"),
            ignore=top.texts("ignore"),
            requires=top.texts("requires"),
            spectral_norm_always=top.flag("spectral_norm_always", False),
            variants=variants,
            kernels=kernels,
            gamma_keys=gamma_keys,
            gamma_value=gamma_value,
            gamma_saved=gamma_saved,
            scale=scale,
            scale_setting=setting,
            kv_pool_stored=layer.flag("kv_pool_stored", True),
            qk_channels=qk_channels,
            value_channels=value_channels,
            widths_required=layer.flag("widths_required", False),
            # TensorFlow's own averages can lie beside any variable; only where the dialect says so are they what it evaluates.
            ema=suffixes or (_AVERAGES if any("/" in form.kernel for form in kernels) else ()),
            ema_first=bool(suffixes),
            telltales=tuple(self._telltale(table) for table in top.tables("telltales")),
            reason=reason,
            instead=instead,
            text=text,
        )
        layer.finish()
        top.finish()
        self._check(found)
        return found

    def _scale(self) -> tuple[str | float, str]:
        table = self.top.table("scale")
        if table is None:
            return 1.0, ""
        setting = table.text("setting")
        raw = table.raw("factor")
        factor: str | float | None
        if isinstance(raw, str):
            factor = table.text("factor")
            if not _POWER.fullmatch(raw):
                table.wrong("factor", raw, "a number, or like 'channels^-0.5' or 'qk_channels^-0.5'")
                factor = None
        else:
            factor = table.number("factor", required=True)
            if factor == 0:
                table.wrong("factor", 0.0, "another number than 0: a scale of 0 is no attention")
        table.finish()
        return 1.0 if factor is None else factor, setting

    def _gamma(self, *, refused: bool) -> tuple[tuple[str, ...], float | None, bool]:
        table = self.top.table("gamma")
        if table is None:
            if not refused:
                self.top.problem(
                    "[gamma] is missing: give its key, or value = 1.0 if the original has no residual gain"
                )
            return (), None, True
        keys, value, saved = table.texts("key"), table.number("value"), table.flag("saved", True)
        if bool(keys) == (value is not None):
            table.problem(f"needs either key or value, and has {'both' if keys else 'none'}")
        for key in keys:
            self._pattern(table, "key", key)
        table.finish()
        return keys, value, saved

    def _kernels(self, table: TomlTable) -> list[KernelForm]:
        axes = table.text("axes", required=True)
        if axes and not (axes.count("O") == axes.count("I") == 1 and set(axes) <= set("OIHWL1")):
            table.wrong(
                "axes",
                axes,
                "the letters O and I once each, and H, W, L or 1 for axes of size 1, like 'OIHW'",
            )
        kernel, bias = table.text("kernel", required=True), table.text("bias")
        requires, ignore = table.texts("requires"), table.texts("ignore")
        for name, patterns in (
            ("kernel", (kernel,)),
            ("bias", (bias,)),
            ("requires", requires),
            ("ignore", ignore),
        ):
            for pattern in patterns:
                self._pattern(table, name, pattern, path=True)
        if kernel and _PLACEHOLDER.findall(kernel) not in ([], ["{path}"]):
            table.wrong("kernel", kernel, "a key with {path} as its only placeholder: blocks are found by it")
        if table.raw("spectral_norm") == _TORCH:
            table.text("spectral_norm")
            table.finish()
            if not kernel.endswith("weight") or requires or ignore:
                table.problem(
                    f'spectral_norm = "{_TORCH}" needs a kernel that ends in "weight", and neither requires nor ignore'
                )
            return _torch_forms(kernel, bias, axes)
        inner = table.table("spectral_norm")
        table.finish()
        norm = self._spectral_norm(inner) if inner else None
        return [KernelForm(kernel, bias, axes, requires, ignore, norm)]

    def _spectral_norm(self, table: TomlTable) -> SpectralNorm:
        u, v = table.text("u", required=True), table.text("v")
        sigma = table.text("sigma", required=True, choices=("stored", "iterate"))
        side = table.text("side", choices=("out", "in", "shape")) or "out"
        normalize = table.text("normalize", choices=("max", "add", "root-max", "root-add"))
        eps = table.number("eps", least=0)
        iterations = table.whole("iterations", 1)
        for name, pattern in (("u", u), ("v", v)):
            self._pattern(table, name, pattern, path=True)
        if sigma == "stored":
            if not v:
                table.problem('v is missing: sigma = "stored" is uᵀWv; with u alone it is sigma = "iterate"')
            for name in ("side", "normalize", "eps", "iterations"):
                if table.has(name):
                    table.problem(f'{name} says nothing where sigma = "stored"; leave it out')
        elif sigma == "iterate":
            if v:
                table.problem(
                    'v is not used where sigma = "iterate"; put its key under ignore of [[kernels]]'
                )
            if not normalize or eps is None:
                table.problem(
                    'normalize and eps are needed where sigma = "iterate": the result depends on them'
                )
        table.finish()
        return SpectralNorm(u, v, sigma, side, normalize or "max", eps or 0.0, iterations)

    def _variants(self, layer: TomlTable, *, refused: bool) -> tuple[Variant, ...]:
        top = self.top
        roles = self._roles(top.table("roles"))
        norm = top.table("batch_norm")
        base = self._variant("", layer, roles, self._batch_norm(norm) if norm else None, None)
        tables = top.tables("variants")
        found = []
        for table in tables:
            changed = roles | self._roles(table.table("roles"))
            inherited: BatchNorm | None = base.batch_norm
            if table.raw("batch_norm") is False:
                table.flag("batch_norm", False)
                inherited = None
            elif inner := table.table("batch_norm"):
                inherited = self._batch_norm(inner)
            found.append(self._variant(table.text("name", required=True), table, changed, inherited, base))
            table.finish()
        for variant in found or [base]:
            where = f"variant {variant.name!r}: " if variant.name else ""
            self._check_roles(variant, where, refused=refused)
        return tuple(found) or (base,)

    def _variant(
        self,
        name: str,
        table: TomlTable,
        roles: Mapping[str, str],
        batch_norm: BatchNorm | None,
        base: Variant | None,
    ) -> Variant:
        bias_free = table.texts("bias_free")
        for role in bias_free:
            if role not in ROLES:
                table.wrong("bias_free", role, f"roles: {', '.join(ROLES)}")
        return Variant(
            name,
            dict(roles),
            table.flag_or_stored("out_projection", base.out_projection if base else False),
            table.flag_or_stored("use_bias", base.use_bias if base else True),
            bias_free if base is None or table.has("bias_free") else base.bias_free,
            table.whole("kv_pool", base.kv_pool if base else 1),
            batch_norm,
        )

    def _roles(self, table: TomlTable | None) -> dict[str, str]:
        if table is None:
            return {}
        found = {role: path for role in ROLES if (path := table.text(role))}
        for role, path in found.items():
            self._pattern(table, role, path)
        table.finish()
        return found

    def _check_roles(self, variant: Variant, where: str, *, refused: bool) -> None:
        roles = variant.roles
        needed = ["query", "key", "value"] + ([] if variant.out_projection is False else ["out"])
        missing = [role for role in needed if role not in roles]
        if missing and not (refused and not roles):
            self.top.problem(f"{where}[roles] lacks {', '.join(missing)}")
        if "out" in roles and variant.out_projection is False:
            self.top.problem(f'{where}[roles] has out, so [layer] out_projection should be true or "stored"')
        for path in sorted(set(roles.values())):
            owners = [role for role in ROLES if roles.get(role) == path]
            if len(owners) > 1:
                self.top.problem(f"{where}[roles] gives {' and '.join(owners)} the same name {path!r}")

    def _batch_norm(self, table: TomlTable) -> BatchNorm:
        keys = {
            name: table.text(name, required=name in ("mean", "var"))
            for name in ("weight", "bias", "mean", "var")
        }
        for name, key in keys.items():
            self._pattern(table, name, key)
        eps = table.number("eps", required=True, least=0)
        table.finish()
        return BatchNorm(**keys, eps=eps or 0.0)

    def _telltale(self, table: TomlTable) -> Telltale:
        key, missing, beside = table.text("key"), table.text("missing"), table.text("beside")
        reason = table.text("reason", required=True)
        if bool(key) == bool(missing):
            table.problem(f"needs either key or missing, and has {'both' if key else 'none'}")
        table.finish()
        return Telltale(key or missing, bool(missing), reason, beside)

    def _width(self, layer: TomlTable, name: str) -> str:
        rule = layer.text(name)
        if rule and not _WIDTH.fullmatch(rule):
            layer.wrong(name, rule, "like 'channels' or 'channels//8'")
            return ""
        return rule

    def _pattern(self, table: TomlTable, name: str, pattern: str, *, path: bool = False) -> None:
        allowed = ["{prefix}", "{module}"] + (["{path}"] if path else [])
        for found in _PLACEHOLDER.findall(pattern):
            if found not in allowed:
                table.problem(f"{name} = {pattern!r} has {found}; known are {', '.join(allowed)}")

    def _check(self, found: Dialect) -> None:
        top = self.top
        if not found.kernels and not found.refused:
            top.problem("[[kernels]] is missing: say at least once how a projection is stored")
        if any(variant.use_bias is not False for variant in found.variants):
            for index, form in enumerate(found.kernels):
                if not form.bias:
                    top.problem(f"kernels[{index}].bias is missing, though [layer] use_bias is not false")
        if any(variant.batch_norm and variant.out_projection is not True for variant in found.variants):
            top.problem(
                "[batch_norm] is folded into the out projection: [layer] out_projection should be true"
            )
        if found.widths_required and not (found.qk_channels or found.value_channels):
            top.problem("layer.widths_required = true needs qk_channels or value_channels")


def _torch_forms(kernel: str, bias: str, axes: str) -> list[KernelForm]:
    """Every way in which PyTorch code stores a convolution, with spectral norm or without.

    The wrapper class is that of github.com/christiancosgrove/pytorch-spectral-normalization-gan, spectral_normalization.py.
    """
    path, wrapper = kernel.removesuffix("weight"), f"{kernel.removesuffix('weight')}module."
    made = f"{path}parametrizations.weight."
    inner_bias = f"{wrapper}{bias.removeprefix(path)}" if bias else ""

    def stored(u: str, v: str) -> SpectralNorm:
        return SpectralNorm(u, v, "stored", "out", "max", 0.0, 1)

    iterated = SpectralNorm(f"{wrapper}weight_u", "", "iterate", "out", "add", 1e-12, 1)
    return [
        KernelForm(kernel, bias, axes),
        KernelForm(f"{path}weight_orig", bias, axes, (), (), stored(f"{path}weight_u", f"{path}weight_v")),
        KernelForm(f"{made}original", bias, axes, (), (), stored(f"{made}0._u", f"{made}0._v")),
        KernelForm(kernel, bias, axes, (f"{path}weight_orig", f"{path}weight_u")),
        KernelForm(f"{wrapper}weight_bar", inner_bias, axes, (), (f"{wrapper}weight_v",), iterated),
    ]
