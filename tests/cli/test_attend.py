"""`selfattn attend`: the picture of a planted match, and each bad input's own message and exit code."""

import io
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner
from PIL import Image

from selfattn_core import SelfAttentionConfig, init_params, parameter_table, save, save_blocks, spec
from selfattn_core.cli import attend as attending
from selfattn_core.cli import main
from selfattn_core.cli.attend import attend_files
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
    assert found.rows.shape == (2, H, W)
    for row, size in zip(found.rows, found.statistics.effective_size, strict=True):
        assert row[1, 6] == pytest.approx(0.5, abs=1e-3)
        assert row[4, 2] == pytest.approx(0.5, abs=1e-3)
        assert size == pytest.approx(2, abs=1e-2)


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
    points = [(10 * h, 10 * w) for h in range(H) for w in range(W)]
    found = attend_files(files / "normalised.safetensors", files / "x.npy", files / "image.png", points)
    want = spec.attention_map(*fold_spectral_norm(config, params), np.load(files / "x.npy")[None])
    unnormalised = spec.attention_map(
        SelfAttentionConfig(C, 5),
        {name: array for name, array in params.items() if name in parameter_table(config)},
        np.load(files / "x.npy")[None],
    )
    tolerance = 64 * np.finfo(np.float32).eps
    assert np.abs(found.rows.reshape(want.shape) - want).max() < tolerance
    assert np.abs(found.rows.reshape(want.shape) - unnormalised).max() > 100 * tolerance


def test_gamma_of_zero_is_warned_of(files):
    save(files / "zero.safetensors", CONFIG, planted_params() | {"gamma": np.zeros(1, np.float32)})
    result = attend(files, weights="zero.safetensors")
    assert result.exit_code == 0
    assert "warning: gamma = 0: the map has no effect on the output yet" in result.stderr
    assert (files / "map.png").exists()


def header_of(shape):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


def spoiled(folder):
    """Files that nothing can be drawn from."""
    np.save(folder / "narrow.npy", np.ones((H, W, 12), np.float32))
    np.save(folder / "flat.npy", np.ones((H * W, C), np.float32))
    np.save(folder / "whole.npy", np.ones((H, W, C), np.int64))
    np.save(folder / "nan.npy", np.full((H, W, C), np.nan, np.float32))
    np.save(folder / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.save(folder / "empty.npy", np.ones((0, H, W, C), np.float32))
    np.save(folder / "overflow.npy", np.full((H, W, C), 1e30, np.float32))
    np.save(folder / "huge.npy", np.zeros((1025, 1024, C), np.float16))
    whole = (folder / "x.npy").read_bytes()
    (folder / "cut.npy").write_bytes(whole[:-1])
    for name, shape in (("promised", (2**20, 2**20, C)), ("wide", (2**32,) * 3)):
        (folder / f"{name}.npy").write_bytes(header_of(shape) + whole[128:])
    with zipfile.ZipFile(folder / "promised.npz", "w") as archive:
        archive.write(folder / "promised.npy", "x.npy")
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
        ({"out": "map"}, "got the suffix ''; expected one of"),
        ({"out": "map.eps"}, "PostScript has no transparency"),
        ({"out": "map.ps"}, "PostScript has no transparency"),
        ({"out": "map.pgf"}, "keeps its images in separate files; LaTeX accepts .pdf; expected one of"),
        ({"features": "promised.npy"}, "promised.npy: promises an array of shape (1048576, 1048576, 16)"),
        (
            {"features": "cut.npy"},
            "cut.npy: promises an array of shape (5, 8, 16) and dtype float32, 2688 bytes",
        ),
        ({"features": "promised.npz"}, "x.npy: float32 (1048576, 1048576, 16) needs"),
        (
            {"features": "wide.npy"},
            "wide.npy: the shape [4294967296, 4294967296, 4294967296] is not one of an array",
        ),
        ({"features": "huge.npy"}, "features of 1025×1024 positions; at most 1048576"),
        ({"features": "empty.npy"}, "holds a batch of no samples"),
        ({"features": "overflow.npy"}, "is NaN or infinite; are they the input of this layer?"),
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


def test_a_suffix_is_refused_before_anything_is_read(files, monkeypatch):
    monkeypatch.setattr(attending, "load", lambda *_, **__: pytest.fail("read"))
    assert "got the suffix" in attend(files, out="map.text").stderr


@pytest.mark.parametrize(
    "suffix",
    ["png", "pdf", "svg", "svgz", "jpg", "jpeg", "tif", "tiff", "gif", "raw", "rgba", "webp", "avif"],
)
def test_every_suffix_that_is_offered_is_written(files, suffix):
    result = attend(files, out=f"map.{suffix}")
    if f".{suffix}" not in attend(files, out="map.text").stderr:
        # A build of Pillow without it.
        assert result.exit_code == 2
    else:
        assert result.exit_code == 0, result.output
        assert (files / f"map.{suffix}").stat().st_size > 1000
        assert not result.stderr


def test_the_suffixes_are_those_of_the_test_before(files):
    offered = attend(files, out="map.text").stderr.partition("expected one of ")[2].strip().rstrip(".")
    written = [
        "png",
        "pdf",
        "svg",
        "svgz",
        "jpg",
        "jpeg",
        "tif",
        "tiff",
        "gif",
        "raw",
        "rgba",
        "webp",
        "avif",
    ]
    assert {name.strip().removeprefix(".") for name in offered.split(",")} <= set(written)


@pytest.mark.parametrize("pillows", [None, 3000, 1000])
def test_a_picture_of_too_many_pixels_is_not_decoded(files, monkeypatch, pillows):
    """Whatever Pillow thinks of the size: nothing, a warning, an error."""
    monkeypatch.setattr(attending, "LARGEST_IMAGE", 3999)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    result = attend(files)
    assert result.exit_code == 2
    assert "image.png: " in result.stderr
    assert "at most 3999 pixels are decoded: scale it down" in " ".join(result.stderr.split())
    assert not (files / "map.png").exists()


def test_a_picture_at_the_limit_is_drawn_whatever_pillow_warns_of(files, monkeypatch):
    monkeypatch.setattr(attending, "LARGEST_IMAGE", 4000)
    assert attend(files).exit_code == 0


@pytest.mark.parametrize("kept", [8, 60, 400, 6000])
def test_a_damaged_picture_is_named(files, kept):
    path = files / "image.png"
    path.write_bytes(path.read_bytes()[:kept])
    result = attend(files)
    assert result.exit_code == 2, result.output
    assert "image.png: " in result.stderr


@pytest.mark.parametrize("part", ["attention_rows", "relative_change"])
def test_too_little_memory_is_said_of_the_features(files, monkeypatch, part):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(attending, part, full)
    result = attend(files)
    assert result.exit_code == 2
    assert "x.npy: the attention of 5×8 positions does not fit into memory" in result.stderr


def test_a_pipe_is_not_waited_for(files):
    os.mkfifo(files / "pipe")
    for arguments in ({"features": "pipe"}, {"weights": "pipe"}, {"more": ["--image", str(files / "pipe")]}):
        result = attend(files, **arguments)
        assert result.exit_code == 2
        assert "pipe: is not an ordinary file" in result.stderr


def test_features_in_other_orders_and_in_bfloat16(files):
    x = np.load(files / "x.npy")
    points = [(15, 65)]
    want = attend_files(files / "layer.safetensors", files / "x.npy", files / "image.png", points).rows
    halves = (x.view(np.uint32) >> 16).astype(np.uint16)
    rounded = (halves.astype(np.uint32) << 16).view(np.float32)
    np.save(files / "rounded.npy", rounded)
    want_rounded = attend_files(
        files / "layer.safetensors", files / "rounded.npy", files / "image.png", points
    )
    forms = {
        "fortran.npy": (np.asfortranarray(x), want),
        "big.npy": (x.astype(">f4"), want),
        "bfloat16.npy": (halves.view("V2"), want_rounded.rows),
    }
    for name, (array, rows) in forms.items():
        np.save(files / name, array)
        found = attend_files(files / "layer.safetensors", files / name, files / "image.png", points)
        assert (found.rows == rows).all(), name


def test_the_change_of_a_large_map_is_taken_over_positions_drawn_by_lot(files, monkeypatch):
    points = [(15, 65)]
    arguments = (files / "layer.safetensors", files / "x.npy", files / "image.png", points)
    whole = attend_files(*arguments)
    assert whole.changed == H * W
    monkeypatch.setattr(attending, "WHOLE", 30 * H * W)
    part = attend_files(*arguments)
    assert part.changed == 30
    assert (part.rows == whole.rows).all()
    assert part.change != whole.change
    assert part.change == pytest.approx(whole.change, rel=0.2)
    result = attend(files)
    assert (
        f"changes its input by about {part.change:.1%} (root mean square, from 30 of 40 positions)"
        in result.output
    )


# Not `ru_maxrss`, in which a process begins with the peak of the one that started it.
MEASURED = """
import sys
from pathlib import Path
from selfattn_core.cli import main
try:
    main(sys.argv[1:])
finally:
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")))
"""


def test_memory_is_for_what_is_drawn(files):
    """The map from 96×100 positions to as many keys has 369 MB, and the command with it stays below 300 MB."""
    height, width = 96, 100
    x = np.random.default_rng(0).standard_normal((height, width, C)).astype(np.float32)
    np.save(files / "large.npy", x)
    command = ["attend", str(files / "layer.safetensors"), str(files / "large.npy"), "--at", "1,2"]
    command += ["--image", str(files / "image.png"), "--out", str(files / "map.png")]
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, *command], capture_output=True, text=True, check=True
    )
    assert (height * width) ** 2 * 4 > 360e6
    assert int(result.stdout.split()[-1]) < 300e6


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
    from selfattn_core.cli.attend import read_image

    pixels = read_image(files / "image.png")
    with Image.open(files / "image.png") as picture:
        assert (pixels == np.asarray(picture)).all()
        picture.convert("L").save(files / "grey.png")
    assert read_image(files / "grey.png").shape == (50, 80)
