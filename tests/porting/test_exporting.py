"""From canonical to every dialect and back, wherever the layer fits; and why it does not where it does not."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfattn_core import SelfAttentionConfig, init_params, spec
from selfattn_core.porting import PortError
from selfattn_core.porting.blocks.keys import KeyIndex
from selfattn_core.porting.blocks.match import match
from selfattn_core.porting.blocks.plan import plan
from selfattn_core.porting.dialects.catalogue import dialect, dialect_names
from selfattn_core.porting.dialects.settings import settings_of
from selfattn_core.porting.formats import TensorInfo
from selfattn_core.porting.translation.from_dialect import import_block
from selfattn_core.porting.translation.to_dialect import export_block

WRITABLE = [
    *(
        "canonical",
        "torch",
        "keras",
        "flax",
        "fgh",
        "heykeetae",
        "danet",
        "pytorch-advanced",
        "fastai",
        "deoldify",
    ),
    *("rosinality", "fastai-pooled", "biggan", "biggan-hf", "studiogan", "voletiv", "mimicry", "compare-gan"),
    *("taki0112", "taki0112-out", "taki0112-2018", "timm", "mmcv", "nonlocal"),
    *("mmagic", "mmseg-pam", "fastai-1", "fastai-1-pooled", "keras-book"),
]
ALWAYS_NORMALISED = ["biggan-v1", "sagan-tf", "tfgan", "biggan-tfhub", "pathology-gan"]
FREE = ("canonical", "torch", "keras", "flax")


@st.composite
def layers(draw, spectral_norm=False):
    """A config that some dialect can hold, and its parameters: biases and gamma not zero."""
    channels = draw(st.integers(8, 40))
    out_projection, use_bias = draw(st.booleans()), draw(st.booleans())
    kv_pool = draw(st.sampled_from([1, 2]))
    value = draw(st.sampled_from([channels // 2, channels])) if out_projection else channels
    width = draw(st.sampled_from([channels // 8, channels // 2, 3]))
    config = SelfAttentionConfig(
        channels,
        width,
        value,
        out_projection=out_projection,
        use_bias=use_bias,
        kv_pool=kv_pool,
        spectral_norm=spectral_norm,
    )
    generator = np.random.Generator(np.random.PCG64(draw(st.integers(0, 1000))))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    params = {
        name: value
        if name[-2:] in (".u", ".v")
        else value + generator.standard_normal(value.shape).astype(dtype)
        for name, value in init_params(config, 0, dtype).items()
    }
    params["gamma"] = np.array([draw(st.sampled_from([0.7, -0.4, 0.0]))], dtype)
    return config, params


def back(name, exported, config, prefix=""):
    """The dialect's own reading of what it wrote."""
    chosen = dialect(name)
    index = KeyIndex(exported.tensors)
    given = {} if chosen.kv_pool_stored else {"kv_pool": config.kv_pool}
    found = match(chosen, index, prefix)
    assert found.fits, (found.missing, found.unused, found.ambiguous)
    infos = {key: TensorInfo(value.shape, str(value.dtype)) for key, value in exported.tensors.items()}
    planned = plan(found, infos, settings_of(chosen, given))
    assert not planned.problems
    return import_block(planned, exported.tensors.__getitem__, keep_spectral_norm=config.spectral_norm)


def check(name, config, params):
    """True if the dialect holds the layer, and then gives it back."""
    try:
        exported = export_block(dialect(name), config, params)
    except PortError:
        return False
    again = back(name, exported, config)
    steps = [step for steps in exported.steps.values() for step in steps]
    if any("×" in step or "÷" in step or "zeros" in step or "batch norm" in step for step in steps):
        x = np.random.Generator(np.random.PCG64(2)).standard_normal((2, 3, 5, config.channels))
        one, other = (
            spec.forward(layer[0], {key: value.astype(np.float64) for key, value in layer[1].items()}, x)
            for layer in ((config, params), (again.config, again.params))
        )
        # One rounding of each kernel, seen through a softmax of logits that may be large.
        eps = np.finfo(params["gamma"].dtype).eps
        assert np.abs(one - other).max() <= 2000 * eps * max(1, np.abs(one).max())
    else:
        assert again.config == config
        assert list(again.params) == list(params)
        assert all(again.params[key].tobytes() == value.tobytes() for key, value in params.items())
    return True


@settings(max_examples=60, deadline=None, derandomize=True)
@given(layers())
def test_what_is_written_is_read_back(layer):
    config, params = layer
    held = [name for name in dialect_names() if check(name, config, params)]
    assert set(FREE) <= set(held)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(layers(spectral_norm=True))
def test_the_state_of_spectral_norm_is_read_back(layer):
    config, params = layer
    assert check("torch", config, params)
    assert check("canonical", config, params)
    for name in dialect_names():
        check(name, config, params)


@pytest.mark.parametrize("name", WRITABLE)
def test_every_dialect_that_can_be_written_is(name):
    """With the widths and switches that its own class makes."""
    chosen = dialect(name)
    for variant in chosen.variants:
        widths = chosen.widths(24)
        config = SelfAttentionConfig(
            24,
            widths.get("qk_channels", 5),
            widths.get("value_channels", 5 if variant.out_projection else 24),
            out_projection=bool(variant.out_projection),
            use_bias=variant.use_bias is not False,
            kv_pool=variant.kv_pool,
        )
        params = {key: value + 0.3 for key, value in init_params(config, 1).items()}
        assert check(name, config, params)


def test_the_lists_are_whole():
    portable = [name for name in dialect_names() if not dialect(name).refused]
    assert sorted(WRITABLE + ALWAYS_NORMALISED) == sorted(portable)


@pytest.mark.parametrize("name", ALWAYS_NORMALISED)
def test_a_file_of_kernels_that_are_always_divided_cannot_hold_plain_ones(name):
    config = SelfAttentionConfig.pooled(24)
    with pytest.raises(PortError, match="no place for a kernel without spectral norm"):
        export_block(dialect(name), config, init_params(config, 0))


FLAT, POOLED = SelfAttentionConfig(24), SelfAttentionConfig.pooled(24)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "heykeetae",
            POOLED,
            "it has no out projection; its kv_pool is 1; its value_channels is 24 for 24 channels",
        ),
        ("biggan", FLAT, "it has an out projection; its kv_pool is 2"),
        (
            "biggan",
            SelfAttentionConfig(24, 3, 12, out_projection=True, kv_pool=2),
            "it has no query bias",
        ),
        ("heykeetae", SelfAttentionConfig(24, 5), "its qk_channels is 3 for 24 channels"),
        ("mmcv", FLAT, "sub_sample, norm_cfg: it has an out projection"),
        (
            "torchgan",
            FLAT,
            "torchgan (torchgan, SelfAttention2d) cannot be written: the softmax runs over the output positions",
        ),
    ],
)
def test_why_a_layer_does_not_fit(name, config, message):
    params = {key: value + 0.3 for key, value in init_params(config, 0).items()}
    with pytest.raises(PortError, match=re.escape(message)):
        export_block(dialect(name), config, params)


def test_zero_biases_are_no_obstacle():
    config = SelfAttentionConfig(24, 3, 12, out_projection=True, kv_pool=2)
    params = {
        key: value + (0 if key.endswith("bias") else 0.3) for key, value in init_params(config, 0).items()
    }
    assert not any(key.endswith("bias") for key in export_block(dialect("biggan"), config, params).tensors)


GAMMALESS = """
name = "gammaless"
title = "a flat layer that adds the attention as it is"
source = "https://example.org"
layout = "BHWC"

[layer]
kv_pool = POOL

[roles]
query = "q"
key = "k"
value = "v"

[gamma]
value = 2.0

[[kernels]]
axes = "1IO"
kernel = "{path}/w"
bias = "{path}/b"
"""


def test_gamma_goes_into_the_value_only_where_nothing_pools_it(tmp_path):
    """A negative factor does not pass through a maximum."""
    path = tmp_path / "gammaless.toml"
    path.write_text(GAMMALESS.replace("POOL", "1"), encoding="utf-8")
    params = {key: value + 0.3 for key, value in init_params(FLAT, 0).items()}
    params["gamma"] = np.array([-0.7], np.float32)
    exported = export_block(dialect(str(path)), FLAT, params)
    np.testing.assert_allclose(exported.tensors["v/w"][0], params["value.kernel"] * -0.35, rtol=1e-6)
    assert check(str(path), FLAT, params)
    path.write_text(GAMMALESS.replace("POOL", "2"), encoding="utf-8")
    pooled = SelfAttentionConfig(24, kv_pool=2)
    with pytest.raises(PortError, match="a negative factor does not commute with max pooling"):
        export_block(dialect(str(path)), pooled, params)


def test_a_prefix_is_put_before_every_key():
    config = SelfAttentionConfig(24)
    exported = export_block(dialect("danet"), config, init_params(config, 0), prefix="head.sa.")
    assert all(key.startswith("head.sa.") for key in exported.tensors)
    assert list(exported.made_of) == list(exported.tensors) == list(exported.steps)


def test_notes_say_what_the_tensors_do_not():
    config = SelfAttentionConfig(24)
    notes = export_block(dialect("fgh"), config, init_params(config, 0)).notes
    assert any("set it to 0 by hand" in note for note in notes)
    bare = SelfAttentionConfig(24, use_bias=False)
    notes = export_block(dialect("fastai"), bare, init_params(bare, 0)).notes
    assert any("remove_spectral_norm" in note for note in notes)
    notes = export_block(dialect("torch"), POOLED, init_params(POOLED, 0)).notes
    assert any("kv_pool = 2" in note for note in notes)
