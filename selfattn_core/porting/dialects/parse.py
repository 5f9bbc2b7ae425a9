"""Reads the file of a dialect.

A dialect is a TOML file. The files in `data/` are built in. `selfattn dialects NAME` prints one, as a start for your own.
A file can contain these fields:

```toml
name = "my-layer"                    # required
title = "my model's attention"       # required: a description in a few words
source = "https://…"                 # required: the address of the implementation
layout = "BCHW"                      # required: the layout of its feature maps, or "BHWC"
prefixes = ["generator.attn."]       # the usual prefixes of its blocks
caveats = ["…"]                      # facts that a user must know; every report prints them
ignore = ["*.num_batches_tracked"]   # keys that do not change the function, as globs under the prefix
requires = ["norm.weight"]           # keys that must be in the file but are not read
spectral_norm_always = true          # the class always has spectral norm

[layer]                              # the layer; its widths are read from the kernels
out_projection = false               # or "stored": the file shows it
use_bias = true                      # or "stored"
bias_free = ["out"]                  # roles without a bias, if the others have one
kv_pool = 1
kv_pool_stored = true                # false: the file does not show it. It is an assumption, and `--set kv_pool=2` changes it
qk_channels = "channels//8"          # the width for `channels`, if the original allows no other
value_channels = "channels"
widths_required = false              # true: other widths belong to another implementation

[roles]                              # required: the name of the projection that ACTS as each role
query = "f"
key = "g"
value = "h"
out = "o"                            # if there is one

[gamma]                              # required: key or value
key = "gamma"                        # its key. With `saved = false` files usually lack it, and a port asks for `--set gamma=…`
value = 1.0                          # the original has no gamma and behaves as with this value

[[kernels]]                          # required: one table for each way to store a projection; the file decides
axes = "OIHW"                        # the axes of the kernel: O, I, and H, W, L or 1 for axes of size 1
kernel = "{path}.weight_orig"        # {path} is the role's name
bias = "{path}.bias"
requires = ["…"]                     # keys that must be in the file but are not read
ignore = ["{path}.sv0"]              # keys that may be in the file and are not read

[kernels.spectral_norm]
u = "{path}.weight_u"
v = "{path}.weight_v"                # for sigma = "stored"
sigma = "stored"                     # uᵀWv of the stored vectors; "iterate": power iteration from u first
side = "out"                         # u has C_out elements; "in": C_in; "shape": the shape of u decides, (1, C_out) or (C_in, 1)
normalize = "max"                    # t/max(‖t‖, eps); "add": t/(‖t‖ + eps); "root-max": t/√max(Σt², eps); "root-add": t/√(Σt² + eps)
eps = 1e-12
iterations = 1

# spectral_norm = "torch" in [[kernels]] means every way in which PyTorch code stores a kernel that ends in "weight":
# - plain
# - weight_orig, weight_u and weight_v
# - parametrizations.weight.…
# - the effective kernel beside weight_orig, as before torch 1.0
# - module.weight_bar, module.weight_u and module.weight_v of the wrapper class SpectralNorm

[scale]                              # the factor of the scores
factor = "qk_channels^-0.5"          # or "channels^-0.5", or a number
setting = "use_scale"                # the file does not show the factor; `--set use_scale=false` makes it 1

[batch_norm]                         # over the output of the last projection, in evaluation mode
weight = "norm.weight"               # weight and bias may be absent
bias = "norm.bias"
mean = "norm.running_mean"
var = "norm.running_var"
eps = 1e-5

[ema]                                # the averaged copies of kernels, biases and gamma that the original evaluates with
suffixes = ["/ema_0.9999"]           # `--set ema=false` uses the raw ones. TensorFlow's /ExponentialMovingAverage needs no
                                     # table: `--set ema=true` uses it

[[variants]]                         # the same dialect with changes; the file's keys decide
name = "with pooling"
roles = { key = "g.0", value = "h.0" }
kv_pool = 2                          # also out_projection, use_bias, bias_free, [variants.batch_norm] or batch_norm = false

[[telltales]]                        # a key that reveals another function
key = "concat_project.*"             # or `missing = "…"`, with `beside = "…"` to require another key
reason = "…"

[refusal]                            # this library cannot express the layer
reason = "…"
instead = "…"
```

`.` and `/` mean the same in a pattern and in a file. `{prefix}` is the block's prefix, and `{module}` is the prefix without its
first part. A pattern that begins with `//` is a whole key, for example `//batch_stats/{module}/{path}/u`.
"""

import re
import tomllib
from collections.abc import Mapping

from selfattn_core.porting.dialects.dialect import (
    POWER,
    ROLES,
    WIDTH,
    BatchNorm,
    Dialect,
    KernelForm,
    SpectralNorm,
    Telltale,
    Variant,
)
from selfattn_core.porting.dialects.toml_table import TomlTable
from selfattn_core.porting.errors import PortError
from selfattn_core.problems import Problem

__all__ = ["parse_dialect"]

# The name for every way in which PyTorch code stores a kernel.
_TORCH = "torch"
_AVERAGES = ("/ExponentialMovingAverage",)
_PLACEHOLDER = re.compile(r"\{[^}]*\}?|\}")


def parse_dialect(text: str, where: str) -> Dialect:
    """Read a dialect from the text of its file.

    Args:
        text: TOML, as the module's docstring describes.
        where: the file's name, for messages.

    Raises:
        PortError: if the text is not TOML, or if the dialect is incomplete or inconsistent (with every problem).

    Example:
        >>> from selfattn_core.porting.dialects.catalogue import dialect
        >>> parse_dialect(dialect("biggan").text, "mine.toml").title == dialect("biggan").title
        True
    """
    try:
        content = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise PortError(f"{where}: is not TOML: {error}") from error
    except ValueError as error:
        # Python's own message is advice for a programmer.
        raise PortError(f"{where}: contains a number with thousands of digits.") from error
    problems: list[str] = []
    parsed = _Parser(TomlTable(content, "", problems)).parse(text)
    if problems:
        reasons = [Problem("bad_dialect", problem) for problem in problems]
        raise PortError.of(f"{where}: is not a usable dialect:\n  ", reasons)
    return parsed


class _Parser:
    """Reads the tables of one file. The tables share the list of problems."""

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
            # TensorFlow may store averages beside any variable. They are the default only if the dialect lists them.
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
            if not POWER.fullmatch(raw):
                table.wrong("factor", raw, "a number, or like 'channels^-0.5' or 'qk_channels^-0.5'")
                factor = None
        else:
            factor = table.number("factor", required=True)
            if factor == 0:
                table.wrong(
                    "factor", 0.0, "a number other than 0, because a scale of 0 makes all weights equal"
                )
        table.finish()
        return 1.0 if factor is None else factor, setting

    def _gamma(self, *, refused: bool) -> tuple[tuple[str, ...], float | None, bool]:
        table = self.top.table("gamma")
        if table is None:
            if not refused:
                self.top.problem(
                    "[gamma] is missing: write its key, or value = 1.0 if the original has no residual gain"
                )
            return (), None, True
        keys, value, saved = table.texts("key"), table.number("value"), table.flag("saved", True)
        if bool(keys) == (value is not None):
            table.problem(f"needs either key or value, but has {'both' if keys else 'neither'}")
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
            table.wrong(
                "kernel",
                kernel,
                "a key with {path} as its only placeholder, because the reader finds blocks by it",
            )
        if table.raw("spectral_norm") == _TORCH:
            table.text("spectral_norm")
            table.finish()
            if not kernel.endswith("weight") or requires or ignore:
                table.problem(
                    f'spectral_norm = "{_TORCH}" needs a kernel that ends in "weight", without requires and ignore'
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
                table.problem('v is missing: sigma = "stored" is uᵀWv. With u only, write sigma = "iterate"')
            for name in ("side", "normalize", "eps", "iterations"):
                if table.has(name):
                    table.problem(f'{name} has no effect with sigma = "stored"; remove it')
        elif sigma == "iterate":
            if v:
                table.problem('v is not used with sigma = "iterate"; put its key into ignore of [[kernels]]')
            if not normalize or eps is None:
                table.problem(
                    'normalize and eps are needed with sigma = "iterate", because the result depends on them'
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
            table.problem(f"needs either key or missing, but has {'both' if key else 'neither'}")
        table.finish()
        return Telltale(key or missing, bool(missing), reason, beside)

    def _width(self, layer: TomlTable, name: str) -> str:
        rule = layer.text(name)
        if rule and not WIDTH.fullmatch(rule):
            layer.wrong(name, rule, "like 'channels' or 'channels//8'")
            return ""
        return rule

    def _pattern(self, table: TomlTable, name: str, pattern: str, *, path: bool = False) -> None:
        allowed = ["{prefix}", "{module}"] + (["{path}"] if path else [])
        for found in _PLACEHOLDER.findall(pattern):
            if found not in allowed:
                table.problem(f"{name} = {pattern!r} has {found}; the placeholders are {', '.join(allowed)}")

    def _check(self, found: Dialect) -> None:
        top = self.top
        if not found.kernels and not found.refused:
            top.problem("[[kernels]] is missing: describe at least one way to store a projection")
        if any(variant.use_bias is not False for variant in found.variants):
            for index, form in enumerate(found.kernels):
                if not form.bias:
                    top.problem(f"kernels[{index}].bias is missing, but [layer] use_bias is not false")
        if any(variant.batch_norm and variant.out_projection is not True for variant in found.variants):
            top.problem(
                "[batch_norm] is folded into the out projection, so [layer] out_projection should be true"
            )
        if found.widths_required and not (found.qk_channels or found.value_channels):
            top.problem("layer.widths_required = true needs qk_channels or value_channels")


def _torch_forms(kernel: str, bias: str, axes: str) -> list[KernelForm]:
    """Every way in which PyTorch code stores a convolution, with spectral norm or without.

    The wrapper class comes from github.com/christiancosgrove/pytorch-spectral-normalization-gan, spectral_normalization.py.
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
