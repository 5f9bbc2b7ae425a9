"""`selfattn attend`: the picture of a planted match, and each bad input's own message and exit code."""

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner
from PIL import Image

from selfattn_core import SelfAttentionConfig, init_params, parameter_table, save, save_blocks, spec
from selfattn_core.attend import attend_files
from selfattn_core.cli import main
from selfattn_core.params import fold_spectral_norm

H, W, C = 5, 8, 16
CONFIG = SelfAttentionConfig(C, 16, kv_pool=1)


def planted_params():
    """Queries and keys are the features themselves, so that equal features find each other."""
    params = {name: np.zeros(row.shape, np.float32) for name, row in parameter_table(CONFIG).items()}
    params["query.kernel"] = np.eye(C, dtype=np.float32)
    params["key.kernel"] = np.eye(C, dtype=np.float32)
    params["value.kernel"] = np.eye(C, dtype=np.float32)
    params["gamma"] = np.full(1, 0.7, np.float32)
    return params


@pytest.fixture
def files(tmp_path):
    """Position (1, 6) and position (4, 2) have the same features, which no other has."""
    generator = np.random.default_rng(3)
    x = generator.uniform(0, 1, (2, H, W, C)).astype(np.float32)
    x[:, 1, 6] = x[:, 4, 2] = 0
    x[:, 1, 6, 3] = x[:, 4, 2, 3] = 9
    save(tmp_path / "layer.safetensors", CONFIG, planted_params())
    np.save(tmp_path / "x.npy", x[1])
    np.save(tmp_path / "batch.npy", x)
    np.save(tmp_path / "first.npy", np.moveaxis(x, -1, 1))
    np.savez(tmp_path / "x.npz", x=x[:1], other=x[:, :1])
    pixels = generator.integers(0, 256, (10 * H, 10 * W, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path


def attend(folder, *, weights="layer.safetensors", features="x.npy", at=("15,65",), more=(), out="map.png"):
    points = [part for point in at for part in ("--at", point)]
    command = ["attend", str(folder / weights), str(folder / features), "--image", str(folder / "image.png")]
    return CliRunner().invoke(main, [*command, *points, "--out", str(folder / out), *more])


def test_the_planted_match_is_found_and_drawn(files):
    result = attend(files, at=("15,65", "44,29"))
    assert result.exit_code == 0, result.output
    assert "1: pixel 15,65 is position 1,6 of 5×8" in result.output
    assert "2: pixel 44,29 is position 4,2 of 5×8" in result.output
    assert "gamma +0.7: the layer changes its input by" in result.output
    with Image.open(files / "map.png") as picture:
        assert picture.width > picture.height
    found = attend_files(
        files / "layer.safetensors", files / "x.npy", files / "image.png", [(15, 65), (44, 29)]
    )
    for position in found.positions:
        assert found.grid[position][1, 6] == pytest.approx(0.5, abs=1e-3)
        assert found.grid[position][4, 2] == pytest.approx(0.5, abs=1e-3)
        assert found.statistics.effective_size[position] == pytest.approx(2, abs=1e-2)


@pytest.mark.parametrize(
    ("features", "more"),
    [
        ("batch.npy", ["--sample", "1"]),
        ("first.npy", ["--sample", "1", "--layout", "channels_first"]),
        ("x.npz", ["--array", "x"]),
    ],
)
def test_the_forms_of_features(files, features, more):
    result = attend(files, features=features, more=more)
    assert result.exit_code == 0, result.output
    assert "attends to 2.0 keys" in result.output


def test_a_block_of_a_file_with_several(files):
    save_blocks(
        files / "gan.safetensors",
        {"g": (CONFIG, planted_params()), "d": (SelfAttentionConfig(24), draw(SelfAttentionConfig(24)))},
    )
    assert attend(files, weights="gan.safetensors", more=["--block", "g"]).exit_code == 0
    result = attend(files, weights="gan.safetensors", out="other.png")
    assert result.exit_code == 2
    assert "pass --block, one of: g, d" in result.output


def draw(config):
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(row.shape) for name, row in parameter_table(config).items()}


def test_spectral_norm_is_that_of_the_evaluation(files):
    config = SelfAttentionConfig(C, 5, spectral_norm=True)
    params = init_params(config, seed=1) | {"gamma": np.full(1, 0.7, np.float32)}
    save(files / "normalised.safetensors", config, params)
    points = [(15, 65)]
    found = attend_files(files / "normalised.safetensors", files / "x.npy", files / "image.png", points)
    want = spec.attention_map(*fold_spectral_norm(config, params), np.load(files / "x.npy")[None])
    unnormalised = spec.attention_map(
        SelfAttentionConfig(C, 5),
        {name: array for name, array in params.items() if name in parameter_table(config)},
        np.load(files / "x.npy")[None],
    )
    tolerance = 64 * np.finfo(np.float32).eps
    assert np.abs(found.grid.reshape(want.shape) - want).max() < tolerance
    assert np.abs(found.grid.reshape(want.shape) - unnormalised).max() > 100 * tolerance


def test_gamma_of_zero_is_warned_of(files):
    save(files / "zero.safetensors", CONFIG, planted_params() | {"gamma": np.zeros(1, np.float32)})
    result = attend(files, weights="zero.safetensors")
    assert result.exit_code == 0
    assert "warning: gamma = 0: the map has no effect on the output yet" in result.stderr
    assert (files / "map.png").exists()


def spoiled(folder):
    """Files that nothing can be drawn from."""
    np.save(folder / "narrow.npy", np.ones((H, W, 12), np.float32))
    np.save(folder / "flat.npy", np.ones((H * W, C), np.float32))
    np.save(folder / "whole.npy", np.ones((H, W, C), np.int64))
    np.save(folder / "nan.npy", np.full((H, W, C), np.nan, np.float32))
    np.save(folder / "objects.npy", np.array([{}], object), allow_pickle=True)
    (folder / "text.npy").write_text("not an array", encoding="utf-8")
    safetensors.numpy.save_file({"w": np.ones(3, np.float32)}, folder / "foreign.safetensors")
    (folder / "text.safetensors").write_text("not weights", encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"at": ("50,3",)},
            "got the point 50,3 outside the image; expected y,x in pixels, y from 0 to 49 and x from 0 to 79",
        ),
        ({"at": ("3",)}, "got '3'; expected y,x in pixels"),
        ({"at": ("-1,3", "0,80")}, "points -1,3, 0,80 outside"),
        ({"at": ("1,1",) * 7}, "--at: got 7 points; expected 1 to 6"),
        ({"features": "missing.npy"}, "missing.npy: no such file"),
        ({"features": "narrow.npy"}, "with C = 16: are they the input of this layer?"),
        ({"features": "flat.npy"}, "its rank is 2"),
        ({"features": "whole.npy"}, "floating point"),
        ({"features": "nan.npy"}, "NaN"),
        ({"features": "objects.npy"}, "holds Python objects, which are not unpickled; expected"),
        ({"features": "text.npy"}, "cannot be read as .npy or .npz"),
        ({"features": "batch.npy"}, "holds a batch of 2; pass --sample, 0 to 1"),
        ({"features": "batch.npy", "more": ["--sample", "2"]}, "has no sample 2"),
        ({"features": "x.npy", "more": ["--sample", "0"]}, "pass no --sample"),
        ({"features": "first.npy", "more": ["--sample", "0"]}, "pass --layout channels_first"),
        ({"features": "x.npz"}, "holds 2 arrays; pass --array, one of: x, other"),
        ({"features": "x.npz", "more": ["--array", "y"]}, "has no array 'y'; it holds the arrays x, other"),
        ({"features": "x.npy", "more": ["--array", "y"]}, "pass no --array"),
        ({"weights": "text.safetensors"}, "cannot be read as .safetensors"),
        ({"weights": "text.safetensors"}, "make a canonical file of it: selfattn port"),
        ({"weights": "foreign.safetensors"}, "make a canonical file of it: selfattn port"),
        ({"out": "image.png", "more": ["--force"]}, "would replace --image; name another"),
        ({"out": "./x.npy", "more": ["--force"]}, "would replace FEATURES; name another"),
        ({"out": "layer.safetensors", "more": ["--force"]}, "would replace WEIGHTS; name another"),
        ({"more": ["--image", "nowhere.png"]}, "nowhere.png: no such file."),
        ({"more": ["--image", "/"]}, "/: is a folder, where a file is expected"),
        ({"out": "map.text"}, "got the suffix '.text'"),
        ({"out": "nowhere/map.png"}, "there is no folder"),
    ],
    ids=lambda value: " ".join(f"{key}" for key in value) if isinstance(value, dict) else "",
)
def test_bad_input_exits_2_and_writes_nothing(files, arguments, message):
    spoiled(files)
    before = set(files.iterdir())
    result = attend(files, **arguments)
    assert result.exit_code == 2, result.output
    assert " ".join(message.split()) in " ".join(result.stderr.split())
    assert "allow_pickle" not in result.stderr
    assert "?." not in result.stderr
    assert set(files.iterdir()) == before


def test_a_title_is_text_and_no_formula(files):
    result = attend(files, more=["--title", r"a $\foo$"])
    assert result.exit_code == 0, result.output


def test_a_picture_that_is_no_picture(files):
    (files / "image.png").write_text("not a picture", encoding="utf-8")
    result = attend(files)
    assert result.exit_code == 2
    assert "is not a picture that can be read" in result.stderr


def test_an_existing_picture_is_kept_without_force(files):
    (files / "map.png").write_text("precious", encoding="utf-8")
    result = attend(files)
    assert result.exit_code == 2
    assert "pass --force" in result.stderr
    assert (files / "map.png").read_text(encoding="utf-8") == "precious"
    assert attend(files, more=["--force"]).exit_code == 0
    assert (files / "map.png").read_bytes()[1:4] == b"PNG"


def test_without_matplotlib_it_exits_3(files, monkeypatch):
    monkeypatch.setattr("selfattn_core.installed.missing_modules", list)
    result = attend(files)
    assert result.exit_code == 3
    assert "pip install 'selfattn[viz]'" in result.stderr
    assert not (files / "map.png").exists()


def test_colour_and_grey_images_are_read_as_they_are_stored(files):
    from selfattn_core.attend import read_image

    pixels = read_image(files / "image.png")
    with Image.open(files / "image.png") as picture:
        assert (pixels == np.asarray(picture)).all()
        picture.convert("L").save(files / "grey.png")
    assert read_image(files / "grey.png").shape == (50, 80)
