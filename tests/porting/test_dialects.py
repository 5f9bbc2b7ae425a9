"""Dialects as data: the built-in ones, a user's own, and what is said of a wrong one."""

import re
import tomllib

import pytest

from selfattn_core.porting.dialects.catalogue import dialect, dialect_names
from selfattn_core.porting.dialects.parse import parse_dialect
from selfattn_core.porting.dialects.settings import settings_of
from selfattn_core.porting.errors import PortError

EXPECTED = {
    *("canonical", "torch", "keras", "flax", "fgh", "heykeetae", "danet", "sagan-tf", "tfgan", "compare-gan"),
    *("taki0112", "biggan", "biggan-tfhub", "biggan-hf", "studiogan", "voletiv", "mimicry", "fastai"),
    *("fastai-pooled", "deoldify", "rosinality", "pytorch-advanced", "timm", "mmcv", "nonlocal", "biggan-v1"),
    *("mmagic", "mmseg-pam", "fastai-1", "fastai-1-pooled", "keras-book", "pathology-gan"),
    *("taki0112-out", "taki0112-2018", "torchgan", "heykeetae-2018-06-08", "taming", "diffusers", "ashpy"),
}
REFUSED = {"torchgan", "heykeetae-2018-06-08", "taming", "diffusers", "ashpy"}

MINE = """
name = "mine"
title = "my layer"
source = "https://example.org"
layout = "BCHW"

[roles]
query = "a"
key = "b"
value = "c"

[gamma]
key = "gain"

[[kernels]]
axes = "OIHW"
kernel = "{path}.weight"
bias = "{path}.bias"
"""


def test_the_built_in_dialects():
    assert set(dialect_names()) == EXPECTED
    assert len(dialect_names()) == len(EXPECTED)
    assert {name for name in dialect_names() if dialect(name).refused} == REFUSED
    for name in dialect_names():
        assert dialect(name).name == name


def test_the_names_of_query_and_key_are_those_of_what_acts():
    """Pinned apart from the formulas: the traps are the ones that a tidy mind would correct."""
    roles = {name: dialect(name).variants[0].roles for name in EXPECTED - {"ashpy"}}
    for name in ("fastai", "deoldify", "rosinality", "pytorch-advanced", "heykeetae-2018-06-08"):
        assert roles[name]["query"].startswith("key"), name
        assert roles[name]["key"].startswith("query"), name
    for name in ("taki0112", "taki0112-out", "taki0112-2018"):
        assert (roles[name]["query"], roles[name]["key"]) == ("g_conv", "f_conv")
    for name in ("heykeetae", "danet", "fastai-pooled", "torchgan", "torch", "keras", "flax", "canonical"):
        assert roles[name]["query"].startswith("query"), name
    assert (roles["fastai-1"]["query"], roles["pathology-gan"]["query"]) == ("key", "conv_layer_2")
    assert roles["keras-book"]["query"] == "Conv_Theta"
    assert roles["fgh"] == {"query": "f", "key": "g", "value": "h"}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_printed_dialect_is_accepted_back(name, tmp_path):
    path = tmp_path / "copy.toml"
    path.write_text(dialect(name).text, encoding="utf-8")
    assert dialect(str(path)) == dialect(name)


def test_a_byte_order_mark_is_read_over(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(MINE, encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert dialect(str(path)) == parse_dialect(MINE, "mine.toml")


def test_a_minimal_dialect_has_the_defaults_of_the_family():
    found = parse_dialect(MINE, "mine.toml")
    (variant,) = found.variants
    assert (variant.out_projection, variant.use_bias, variant.kv_pool) == (False, True, 1)
    assert found.scale_factor(64, 8) == 1.0


def test_every_problem_is_said_at_once():
    text = """
name = 3
titel = "my layer"
source = "https://example.org"
layout = "NCHW"
prefixes = [1]

[layer]
use_bias = "maybe"
kv_pool = 0
qk_channels = "C/8"
widths_required = true

[roles]
query = "a"
key = "a"
val = "c"

[gamma]
key = "gain"
value = 1.0

[scale]
factor = "dk^0.5"

[batch_norm]
mean = "bn.mean"
eps = -1

[[kernels]]
axes = "OIXY"
kernel = "{role}.weight"

[kernels.spectral_norm]
u = "{path}.u"
sigma = "iterated"

[[kernels]]
axes = "OIHW"
kernel = "{path}.weight"
bias = "{path}.bias"

[kernels.spectral_norm]
u = "{path}.u"
v = "{path}.v"
sigma = "iterate"

[[kernels]]
axes = "OIHW"
kernel = "{path}.weight"
bias = "{path}.bias"

[kernels.spectral_norm]
u = "{path}.u"
sigma = "stored"
eps = 1e-12

[[telltales]]
key = "x"
missing = "y"
reason = "z"

[refusal]
reason = "r"
"""
    with pytest.raises(PortError) as caught:
        parse_dialect(text, "mine.toml")
    message = str(caught.value)
    for part in (
        "mine.toml",
        "name = 3 should be a string",
        "title (a string) is missing",
        "titel is unknown: did you mean title?",
        "layout = 'NCHW' should be one of 'BCHW', 'BHWC'",
        "prefixes = [1] should be",
        "layer.use_bias = 'maybe' should be true, false or \"stored\"",
        "layer.kv_pool = 0 should be a positive whole number",
        "layer.qk_channels = 'C/8' should be like",
        "layer.widths_required = true needs",
        "[roles] lacks value",
        "roles.val is unknown: did you mean value?",
        "gives query and key the same name 'a'",
        "gamma.needs either key or value, but has both",
        "scale.factor = 'dk^0.5' should be a number",
        "batch_norm.var (a string) is missing",
        "batch_norm.eps = -1 should be a number of at least 0",
        "[batch_norm] is folded into the out projection",
        "kernels[0].axes = 'OIXY' should be",
        "kernels[0].kernel = '{role}.weight' has {role}; the placeholders are {prefix}, {module}, {path}",
        "kernels[0].spectral_norm.sigma = 'iterated' should be one of",
        "kernels[1].spectral_norm.v is not used",
        "kernels[1].spectral_norm.normalize and eps are needed",
        "kernels[2].spectral_norm.v is missing",
        "kernels[2].spectral_norm.eps has no effect",
        "telltales[0].needs either key or missing",
        "refusal.instead (a string) is missing",
    ):
        assert part in message, part


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("[[kernels]]\n", "[kernels]\n"), "kernels = "),
        (('bias = "{path}.bias"\n', ""), "kernels[0].bias is missing"),
        (("[gamma]\n", "[gama]\n"), "gama is unknown: did you mean gamma?"),
        (('key = "gain"\n', ""), "needs either key or value, but has neither"),
        (('value = "c"\n', 'value = "c"\nout = "d"\n'), "[roles] has out"),
        (('kernel = "{path}.weight"', 'kernel = "{prefix}.{path}.weight"'), "{path} as its only placeholder"),
        (("[gamma]\n", '[[variants]]\nroles = { key = "a" }\n\n[gamma]\n'), "variants[0].name"),
        (("[gamma]\n", "[scale]\nfactor = 0\n\n[gamma]\n"), "a scale of 0"),
        (("[gamma]\n", "[scale]\nfactor = nan\n\n[gamma]\n"), "scale.factor = nan"),
        (('layout = "BCHW"', 'layout = "BCHW'), "is not TOML"),
    ],
)
def test_one_problem_each(change, problem):
    assert change[0] in MINE
    with pytest.raises(PortError) as caught:
        parse_dialect(MINE.replace(*change), "mine.toml")
    assert problem in str(caught.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(PortError, match="cannot be read as a dialect"):
        dialect(str(tmp_path / "absent.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(PortError, match="cannot be read as a dialect"):
        dialect(str(tmp_path / "folder.toml"))
    for content in (b"\xff\xfe\x00", MINE.encode("utf-16"), b'name = "caf\xe9"'):
        (tmp_path / "binary.toml").write_bytes(content)
        with pytest.raises(
            PortError, match=r"cannot be read as a dialect: .*is not UTF-8 .*save it in that encoding"
        ):
            dialect(str(tmp_path / "binary.toml"))
    (tmp_path / "endless.toml").symlink_to("/dev/zero")
    with pytest.raises(PortError, match="has more than 1048576 bytes"):
        dialect(str(tmp_path / "endless.toml"))
    for name, text, words in (
        ("digits", f"title = {'9' * 6000}", "contains a number with thousands of digits"),
        ("nested", f"title = {'[' * 50_000}", "is not TOML"),
    ):
        (tmp_path / f"{name}.toml").write_text(text)
        with pytest.raises(PortError, match=words):
            dialect(str(tmp_path / f"{name}.toml"))
    (tmp_path / "large.toml").write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(PortError, match="a dialect has a few thousand"):
        dialect(str(tmp_path / "large.toml"))
    with pytest.raises(PortError, match="did you mean heykeetae"):
        dialect("heykeeta")


def test_settings():
    mmcv = dialect("mmcv")
    assert settings_of(mmcv, {}).use_scale
    assert not settings_of(mmcv, {"use_scale": False}).use_scale
    assert settings_of(dialect("fgh"), {"gamma": "-0.5"}).gamma == -0.5
    assert settings_of(dialect("torch"), {"kv_pool": "2"}).kv_pool == 2
    with pytest.raises(PortError) as caught:
        settings_of(mmcv, {"use_scal": "true", "bn_eps": "-1", "use_scale": "perhaps", "gamma": "1"})
    for part in (
        "did you mean use_scale?",
        "bn_eps=-1 should be 0 or more",
        "use_scale=perhaps should be true or false",
        "gamma is not a setting",
    ):
        assert part in str(caught.value)
    for value in ("nan", "inf", "x", True):
        with pytest.raises(PortError, match="should be a finite number"):
            settings_of(dialect("fgh"), {"gamma": value})
    for value in ("0", "1.5", "-2"):
        with pytest.raises(PortError, match="should be a positive whole number"):
            settings_of(dialect("torch"), {"kv_pool": value})


def test_the_schema_is_what_the_docstring_shows():
    """The documented file, its alternatives aside, is accepted."""
    from selfattn_core.porting.dialects import parse as schema

    text = schema.__doc__.partition("```toml\n")[2].partition("```")[0]
    content = tomllib.loads(text.replace("value = 1.0 ", "#"))
    assert content["kernels"][0]["spectral_norm"]["sigma"] == "stored"
    with pytest.raises(PortError) as caught:
        parse_dialect(text, "docs")
    assert "unknown" not in str(caught.value)


def test_every_field_that_is_read_is_documented(monkeypatch):
    """In the list of fields, which the page takes over, and by its table."""
    from selfattn_core.porting.dialects import parse as schema
    from selfattn_core.porting.dialects.toml_table import TomlTable

    asked = set()
    field = TomlTable._field

    def noted(self, name, wanted, required):
        asked.add(name)
        return field(self, name, wanted, required)

    monkeypatch.setattr(TomlTable, "_field", noted)
    for name in dialect_names():
        parse_dialect(dialect(name).text, name)
    assert len(asked) > 40
    field_or_table = r"(^|[\s`{{]){0} = |\[([\w.]+\.)?{0}\]"
    unsaid = [name for name in asked if not re.search(field_or_table.format(name), schema.__doc__)]
    assert unsaid == []
