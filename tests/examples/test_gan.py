"""The three GAN examples in their quick mode, one after the other, and what they say of networks that are not the same."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.digits import data
from examples.gan import agreement, files, quality
from selfattn_core import load, save_blocks

ROOT = Path(__file__).parents[2]


def run(example: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"examples.{example}", "--quick", "--folder", str(folder), *more],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """What the training in PyTorch writes."""
    folder = tmp_path_factory.mktemp("gan")
    result = run("gan_torch", folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "step    20: recognised" in result.stdout
    return folder


def test_the_training_in_pytorch_leaves_pictures_and_a_checkpoint(checkpoint):
    with Image.open(checkpoint / "samples.png") as sheet:
        assert sheet.size == (10 * 10 * 6, 8 * 10 * 6)
    with Image.open(checkpoint / "attention.gif") as movie:
        assert movie.n_frames == 5
    for block in files.BLOCKS:
        config, params = load(checkpoint / files.ATTENTION, block=block)
        assert config.spectral_norm == (block == "discriminator")
        assert params["gamma"] != 0
    assert set(files.load_networks(checkpoint)) == set(files.NETWORKS)


def test_a_checkpoint_comes_back_to_pytorch_as_it_was(checkpoint, tmp_path):
    from examples.gan_torch import checkpoint as torch_checkpoint

    want = files.load_samples(checkpoint)
    networks = torch_checkpoint.load(checkpoint)
    assert agreement.compare(torch_checkpoint.answer(*networks, want.latents, want.labels), want).agrees
    torch_checkpoint.save(*networks, tmp_path, source="a test")
    first, second = files.load_networks(checkpoint), files.load_networks(tmp_path)
    assert all(np.array_equal(first[name], second[name]) for name in files.NETWORKS)


def swapped(params):
    """Query and key exchanged."""
    names = {"query": "key", "key": "query"}
    return {
        ".".join([names.get(name.partition(".")[0], name.partition(".")[0]), *name.split(".")[1:]]): array
        for name, array in params.items()
    }


@pytest.mark.parametrize(
    "bug", ["query and key exchanged", "a vector of the spectral norm lost", "a kernel turned"]
)
def test_networks_that_are_not_the_same_are_noticed(bug, checkpoint, tmp_path):
    from examples.gan_torch import checkpoint as torch_checkpoint

    want = files.load_samples(checkpoint)
    blocks = {block: load(checkpoint / files.ATTENTION, block=block) for block in files.BLOCKS}
    networks = files.load_networks(checkpoint)
    # After so few steps gamma is small; here the generator's attention is to count.
    config, params = blocks["generator"]
    strong = params | {"gamma": np.ones(1, np.float32)}
    save_blocks(tmp_path / files.ATTENTION, blocks | {"generator": (config, strong)})
    files.save_networks(tmp_path, networks)
    want = torch_checkpoint.answer(*torch_checkpoint.load(tmp_path), want.latents, want.labels)
    if bug == "query and key exchanged":
        blocks["generator"] = (config, swapped(strong))
        save_blocks(tmp_path / files.ATTENTION, blocks, overwrite=True)
    elif bug == "a kernel turned":
        kernel = networks["generator.conv2.kernel"]
        files.save_networks(tmp_path, networks | {"generator.conv2.kernel": kernel.swapaxes(0, 1)})
    else:
        u = networks["discriminator.conv2.u"]
        files.save_networks(tmp_path, networks | {"discriminator.conv2.u": np.full_like(u, u.size**-0.5)})
    got = torch_checkpoint.answer(*torch_checkpoint.load(tmp_path), want.latents, want.labels)
    assert not agreement.compare(got, want).agrees


def test_the_training_goes_on_in_flax(checkpoint):
    result = run("gan_flax", checkpoint)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "NOT the same" not in result.stdout
    assert "step     3: recognised" in result.stdout
    assert set(files.load_networks(checkpoint / "flax")) == set(files.NETWORKS)
    for block, name in (("generator", "gamma"), ("discriminator", "query.u")):
        before, after = (
            load(folder / files.ATTENTION, block=block)[1][name]
            for folder in (checkpoint, checkpoint / "flax")
        )
        assert not np.array_equal(before, after)

    from examples.gan_torch import checkpoint as torch_checkpoint

    want = files.load_samples(checkpoint / "flax")
    back = torch_checkpoint.answer(*torch_checkpoint.load(checkpoint / "flax"), want.latents, want.labels)
    assert agreement.compare(back, want).agrees


def test_keras_serves_the_same_images(checkpoint):
    result = run("gan_keras", checkpoint)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "The same 20 images from all three" in result.stdout
    assert (checkpoint / "served" / "saved_model.pb").exists()


@pytest.mark.parametrize("example", ["gan_flax", "gan_keras"])
def test_without_a_checkpoint_it_says_what_to_run(example, tmp_path):
    result = run(example, tmp_path)
    assert result.returncode == 2
    assert "run python -m examples.gan_torch first" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_checkpoint_of_other_shapes_is_refused(checkpoint, tmp_path):
    networks = files.load_networks(checkpoint)
    kernel = networks.pop("generator.dense.kernel")
    with pytest.raises(ValueError, match=r"generator.dense.kernel: got \(1024, 34\), expected \(34, 1024\)"):
        files.save_networks(tmp_path, networks | {"generator.dense.kernel": kernel.T})
    with pytest.raises(ValueError, match=r"generator.dense.kernel: got nothing"):
        files.save_networks(tmp_path, networks)
    assert not list(tmp_path.iterdir())


def test_quality_tells_digits_from_noise_and_variety_from_one_image():
    training, held_out = data.load()
    real = quality.measure(held_out.images, held_out.labels, training, held_out)
    assert real.recognised > 0.95
    assert real.coverage == 1
    noise = np.random.default_rng(0).uniform(size=held_out.images.shape).astype(np.float32)
    assert quality.measure(noise, held_out.labels, training, held_out).recognised < 0.3
    same = np.repeat(held_out.images[:1], 100, axis=0)
    one = quality.measure(same, np.repeat(held_out.labels[:1], 100), training, held_out)
    assert one.recognised == 1
    assert one.coverage < 0.2
