import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfattn_core import SelfAttentionConfig, parameter_table
from selfattn_core.config import check_options
from selfattn_core.params import projections


def test_defaults_are_the_flat_form():
    config = SelfAttentionConfig(64)
    assert config.to_dict() == {
        "channels": 64,
        "qk_channels": 8,
        "value_channels": 64,
        "out_projection": False,
        "use_bias": True,
        "kv_pool": 1,
        "spectral_norm": False,
    }


def test_pooled_is_the_official_form():
    config = SelfAttentionConfig.pooled(65)
    assert config == SelfAttentionConfig(65, 8, 32, out_projection=True, use_bias=False, kv_pool=2)
    assert SelfAttentionConfig.pooled(65, spectral_norm=True) == dataclasses.replace(
        config, spectral_norm=True
    )


def test_a_config_is_frozen_hashable_and_replaceable():
    config = SelfAttentionConfig(64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.channels = 8
    assert {config: 1}[SelfAttentionConfig(64)] == 1
    assert dataclasses.replace(config, kv_pool=2).kv_pool == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channels": 0}, "channels=0 must be a positive integer"),
        ({"channels": -8}, "channels=-8 must be a positive integer"),
        ({"channels": 8.0}, "channels=8.0 must be a positive integer"),
        ({"channels": True}, "channels=True must be a positive integer"),
        ({"channels": "64"}, "channels='64' must be a positive integer"),
        ({"channels": 7}, "pass qk_channels, for example qk_channels=1"),
        ({"channels": 8, "qk_channels": 0}, "qk_channels=0 must be a positive integer"),
        (
            {"channels": 8, "value_channels": -1, "out_projection": True},
            "value_channels=-1 must be a positive integer",
        ),
        ({"channels": 8, "value_channels": 4}, "pass out_projection=True, or value_channels=8"),
        ({"channels": 8, "kv_pool": 0}, "kv_pool=0 must be a positive integer"),
        ({"channels": 8, "use_bias": 1}, "use_bias=1 must be True or False"),
        ({"channels": 8, "out_projection": None}, "out_projection=None must be True or False"),
        ({"channels": 8, "spectral_norm": 1}, "spectral_norm=1 must be True or False"),
    ],
)
def test_a_bad_option_is_named_with_what_to_do(options, words):
    with pytest.raises(ValueError, match="SelfAttentionConfig: ") as error:
        SelfAttentionConfig(**options)
    assert words in str(error.value)


def test_all_problems_are_reported_at_once():
    with pytest.raises(ValueError, match="channels=0") as error:
        SelfAttentionConfig(0, -1, 2.5, kv_pool=0)
    assert all(
        word in str(error.value)
        for word in ("channels=0", "qk_channels=-1", "value_channels=2.5", "kv_pool=0")
    )


def test_options_are_checked_before_channels_are_known():
    check_options()
    check_options(qk_channels=3, value_channels=5, kv_pool=2)
    with pytest.raises(ValueError, match=r"qk_channels=0 .*; spectral_norm='yes' .*; kv_pool=-2"):
        check_options(qk_channels=0, kv_pool=-2, spectral_norm="yes")


def test_pooled_below_eight_channels_says_what_to_pass():
    with pytest.raises(ValueError, match="pass qk_channels"):
        SelfAttentionConfig.pooled(4)


def test_numpy_integers_are_integers():
    config = SelfAttentionConfig(np.int64(16), kv_pool=np.int32(2))
    assert type(config.channels) is int
    assert type(config.kv_pool) is int


widths = st.integers(1, 40)


@given(widths, widths, widths, st.booleans(), st.booleans(), st.integers(1, 4), st.booleans())
def test_a_config_survives_its_dict(channels, qk, value, out, bias, pool, norm):
    config = SelfAttentionConfig(
        channels,
        qk,
        value if out else channels,
        out_projection=out,
        use_bias=bias,
        kv_pool=pool,
        spectral_norm=norm,
    )
    assert SelfAttentionConfig.from_dict(config.to_dict()) == config
    table = parameter_table(config)
    assert list(table)[-1] == "gamma"
    assert {name.partition(".")[0] for name in table} == {*projections(config), "gamma"}
    assert any(name.endswith("bias") for name in table) == bias


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chanels": 8}, "unknown option 'chanels'; 'channels' is missing"),
        ({"channels": 8, "heads": 2}, "'heads'"),
    ],
)
def test_from_dict_refuses_strangers(options, words):
    with pytest.raises(ValueError, match="SelfAttentionConfig") as error:
        SelfAttentionConfig.from_dict(options)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("shape", "layout", "words"),
    [
        ((5, 7, 16), "BHWC", "got input of shape (5, 7, 16); expected (B, H, W, 16): its rank is 3"),
        ((2, 12, 5, 7), "BCHW or CHW", "expected (B, 16, H, W) or (16, H, W): its 12 channels should be 16"),
        ((12, 5, 7), "BCHW or CHW", "its 12 channels should be 16"),
        ((7, 16), "…HWC", "expected (…, H, W, 16): its rank is 2"),
        ((2, 0, 7, 16), "BHWC", "its map of 0×7 positions is smaller than one position"),
        ((2, 1, 7, 3), "BHWC", "its 3 channels should be 16"),
    ],
)
def test_an_input_that_does_not_fit_is_described(shape, layout, words):
    with pytest.raises(ValueError, match="layer: got input") as error:
        SelfAttentionConfig(16).check_input(shape, layout=layout, layer="layer")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 5, 7, 16), "BHWC"),
        ((5, 7, 16), "…HWC"),
        ((3, 2, 5, 7, 16), "…HWC"),
        ((16, 5, 7), "BCHW or CHW"),
        ((0, 16, 5, 7), "BCHW or CHW"),
        ((None, None, None, 16), "BHWC"),
    ],
)
def test_an_input_that_fits_is_taken(shape, layout):
    SelfAttentionConfig(16).check_input(shape, layout=layout)


def test_a_map_smaller_than_the_window_is_refused():
    config = SelfAttentionConfig(16, kv_pool=3)
    config.check_input((1, 3, 3, 16))
    with pytest.raises(ValueError, match="2×9 positions is smaller than one 3×3 pooling window"):
        config.check_input((1, 2, 9, 16))
