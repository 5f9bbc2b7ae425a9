"""The three SAGAN programs at toy size: the same losses, resumption, moving between frameworks, and what they refuse."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.command import FAILED
from examples.digits import data
from examples.gan import files, journal
from examples.gan.agreement import compare
from examples.gan.batches import Batch, draw
from selfattn_core import SelfAttentionConfig, init_params, load, save_blocks
from selfattn_core.conformance.verdicts.tolerance import EPS, FACTOR

ROOT = Path(__file__).parents[2]
PROGRAMS = ("torch", "flax", "keras")
# Of the others JAX and TensorFlow compile every step for a minute or two.
FIRST = [PROGRAMS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in PROGRAMS[1:])]
SEED, STEPS, BROKEN = 3, 4, 2
LOSSES = ("loss/discriminator", "loss/penalty", "loss/generator")
ATTENTION = {
    "generator": SelfAttentionConfig(48, spectral_norm=True),
    "discriminator": SelfAttentionConfig(
        32, 4, 16, out_projection=True, use_bias=False, kv_pool=2, spectral_norm=True
    ),
    "averaged": SelfAttentionConfig(48, spectral_norm=True),
}


def process(*command, **environment):
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path])),
            "CUDA_VISIBLE_DEVICES": "",
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def write_networks(folder):
    """The files of networks with random weights, drawn in numpy; biases and gamma are not zero."""
    random = np.random.default_rng(SEED)

    def value(name, shape):
        array = random.standard_normal(shape)
        if name.endswith((".u", ".v")):
            array /= np.linalg.norm(array)
        else:
            array *= 0.1 if name.endswith(".bias") else np.sqrt(2 / np.prod(shape[:-1]))
        return array.astype(np.float32)

    def attention(config, seed):
        params = init_params(config, seed) | {"gamma": np.float32([0.5])}
        biases = {name: value(name, array.shape) for name, array in params.items() if name.endswith(".bias")}
        return config, params | biases

    save_blocks(
        folder / files.ATTENTION,
        {name: attention(config, seed) for seed, (name, config) in enumerate(ATTENTION.items())},
    )
    files.save_networks(folder, {name: value(name, shape) for name, shape in files.NETWORKS.items()})


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A run to start with, whose answers are PyTorch's."""
    from examples import sagan_torch

    folder = tmp_path_factory.mktemp("start")
    write_networks(folder)
    training = sagan_torch.Training(*sagan_torch.networks_of(folder), precision="float32", compiler="none")
    labels = np.arange(10).repeat(2)
    latents = np.random.default_rng(1).standard_normal((20, 24), np.float32)
    files.save_samples(folder, training.samples(latents, labels))
    return folder


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """Folders of an unbroken run and of one that was resumed, of each program once asked for, and what they printed."""
    done = {}

    def run(framework):
        if framework not in done:
            whole, broken = (tmp_path_factory.mktemp(f"{framework}-{kind}") for kind in ("whole", "broken"))
            common = f"--quick --seed {SEED} --every {BROKEN} --precision float32"
            lines = [
                f"{common} --steps {STEPS} --start {start} --folder {whole}",
                f"{common} --steps {BROKEN} --start {start} --folder {broken}",
                f"{common} --steps {STEPS} --resume --folder {broken}",
            ]
            # What JAX has compiled for the first run serves the others, as it is: compiling is nearly all of their time.
            cache = str(tmp_path_factory.mktemp(f"{framework}-compiled"))
            done[framework] = whole, broken, program(framework, *lines, JAX_COMPILATION_CACHE_DIR=cache)
        return done[framework]

    return run


def program(framework, *lines, **environment):
    """What a program prints, of runs with these options one after the other."""
    result = process("-m", "tests.examples.programs", f"sagan_{framework}", *lines, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def losses_of(folder):
    return np.array([[row[name] for name in LOSSES] for row in journal.read(folder)])


def trained(start, widen, nudge=None):
    """The losses of PyTorch, (STEPS, 3), in float64 if widened, from weights each nudged by up to one rounding."""
    from examples import sagan_torch

    networks = sagan_torch.networks_of(start)
    digits, _ = data.load()
    batches = [draw(digits, SEED, step) for step in range(STEPS)]
    if widen:
        networks = [network.double() for network in networks]
        batches = [
            Batch(*(array.astype(np.float64) if array.dtype == np.float32 else array for array in batch))
            for batch in batches
        ]
    if nudge is not None:
        random = torch.Generator().manual_seed(nudge)
        with torch.no_grad():
            for network in networks:
                for weight in network.parameters():
                    weight.mul_(1 + EPS["float32"] * (torch.rand(weight.shape, generator=random) - 0.5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sagan_torch, "EPSILON", 1e-12)
        training = sagan_torch.Training(*networks, precision="float32", compiler="none")
    return np.array([[row[name] for name in LOSSES] for row in map(training.update, batches)])


@pytest.fixture(scope="module")
def reference(start):
    """The losses in float64, (STEPS, 3), and how far four trainings in float32 stray from them up to each step."""
    want = trained(start, widen=True)
    strays = [np.abs(trained(start, widen=False, nudge=nudge) - want).max(axis=1) for nudge in range(4)]
    return want, np.maximum.accumulate(np.max(strays, axis=0))


@pytest.mark.parametrize("framework", FIRST)
def test_the_losses_are_those_of_float64_up_to_what_rounding_grows_to(framework, runs, reference):
    want, noise = reference
    scale = EPS["float32"] * np.abs(want[0]).max()
    errors = np.abs(losses_of(runs(framework)[0]) - want).max(axis=1)
    assert (errors <= FACTOR * (noise + 4 * scale)).all(), (errors / scale, noise / scale)
    assert (errors <= 64 * scale).all(), errors / scale


@pytest.mark.parametrize("framework", FIRST)
def test_a_resumed_run_is_the_unbroken_one(framework, runs):
    whole, broken, _ = runs(framework)
    assert [row["step"] for row in journal.read(whole)] == list(range(STEPS))
    assert journal.read(broken) == journal.read(whole)
    first, second = files.load_networks(whole), files.load_networks(broken)
    assert all(np.array_equal(first[name], second[name]) for name in files.NETWORKS)
    for block in files.BLOCKS:
        first, second = (load(folder / files.ATTENTION, block=block)[1] for folder in (whole, broken))
        assert all(np.array_equal(first[name], second[name]) for name in first)
    with Image.open(broken / "attention.gif") as film:
        assert film.n_frames == 1 + STEPS // BROKEN


@pytest.mark.parametrize("framework", FIRST)
def test_what_it_trained_goes_back_to_pytorch(framework, runs):
    from examples import sagan_torch

    folder, _, said = runs(framework)
    assert said.count("allowed: 64): the same") == 2
    there = files.load_samples(folder)
    answers = []
    for wide in (False, True):
        networks = [network.double() if wide else network for network in sagan_torch.networks_of(folder)]
        training = sagan_torch.Training(*networks, precision="float32", compiler="none")
        answers.append(
            training.samples(there.latents.astype(np.float64 if wide else np.float32), there.labels)
        )
    here, exact = answers
    # With weights as random as these the generator's map is sharp, and rounding goes further than in a trained one.
    for kind in ("images", "scores"):
        noise = np.abs(getattr(here, kind) - getattr(exact, kind)).max()
        assert np.abs(getattr(there, kind) - getattr(exact, kind)).max() <= FACTOR * noise
    for name in ("generator", "discriminator"):
        assert load(folder / files.ATTENTION, block=name)[1]["gamma"] != np.float32(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiled_in_pytorch_it_computes_the_same(precision, start):
    from examples import sagan_torch

    digits, _ = data.load()
    batch = draw(digits, SEED, 0)
    answers = []
    with torch._dynamo.config.patch(trace_autograd_ops=False):  # the program sets it; it is set back here
        for compiler in ("none", "aot_eager"):
            networks = sagan_torch.networks_of(start)
            training = sagan_torch.Training(*networks, precision=precision, compiler=compiler)
            values = training.update(batch)
            answers.append(np.array([values[name] for name in LOSSES]))
    eager, compiled = answers
    assert np.abs(compiled - eager).max() <= FACTOR * EPS[precision] * np.abs(eager).max()
    wide = losses_of_first_step(start)
    for answer in answers:
        error = np.abs(answer - wide).max() / np.abs(wide).max()
        assert error <= FACTOR * EPS[precision]
        assert precision == "float32" or error > EPS["bfloat16"] / 8, "not in 16 bits"


@pytest.mark.parametrize("framework", FIRST)
def test_a_step_in_sixteen_bits_has_the_losses_of_float32_but_for_their_rounding(framework, start, tmp_path):
    """Its networks are judged in float32 all the same: what it begins with and what it hands on."""
    from examples import sagan_torch

    half = tmp_path / "half"
    line = f"--quick --seed {SEED} --steps 1 --precision bfloat16 --start {start} --folder {half}"
    assert "allowed: 64): the same" in program(framework, line)
    wide = losses_of_first_step(start)
    (losses,) = losses_of(half)
    error = np.abs(losses - wide).max() / np.abs(wide).max()
    assert EPS["bfloat16"] / 64 < error <= FACTOR * EPS["bfloat16"]
    training = sagan_torch.Training(*sagan_torch.networks_of(half), precision="float32", compiler="none")
    there = files.load_samples(half)
    agreement = compare(training.samples(there.latents, there.labels), there)
    assert max(agreement.images, agreement.scores) < 0.1 / EPS["float32"] * EPS["bfloat16"], agreement


def losses_of_first_step(start):
    from examples import sagan_torch

    training = sagan_torch.Training(*sagan_torch.networks_of(start), precision="float32", compiler="none")
    values = training.update(draw(data.load()[0], SEED, 0))
    return np.array([values[name] for name in LOSSES])


@pytest.mark.parametrize("framework", FIRST)
def test_the_average_has_u_and_v_of_the_generator_and_not_shorter_ones(framework, runs):
    generator, averaged = (
        load(runs(framework)[0] / files.ATTENTION, block=block)[1] for block in ("generator", "averaged")
    )
    for name in ("query.u", "query.v", "value.u"):
        assert np.array_equal(generator[name], averaged[name])
        assert np.linalg.norm(averaged[name]) == pytest.approx(1, abs=8 * EPS["float32"])
    assert not np.array_equal(generator["query.kernel"], averaged["query.kernel"])


def test_the_gammas_are_scalars_for_tensorboard(runs):
    from tensorboardX.proto import event_pb2

    whole, *_ = runs("torch")
    (events,) = (whole / "tensorboard").iterdir()
    content, found = events.read_bytes(), {}
    while content:
        # A record is its length, a checksum of that, the event, and a checksum of this.
        (length,) = struct.unpack("<Q", content[:8])
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    for row in journal.read(whole):
        for name in ("gamma/generator", "gamma/discriminator"):
            assert found[name, row["step"]] == np.float32(row[name])


@pytest.mark.slow
def test_the_generator_is_served_by_tensorflow_alone(tmp_path):
    """Of a run as it begins by itself: the weights that the others start with have sharp maps, where rounding grows."""
    folder = tmp_path / "run"
    words = f"--quick --steps 1 --precision float32 --folder {folder}".split()
    result = process("-m", "examples.sagan_torch", *words)
    assert result.returncode == 0, result.stdout + result.stderr
    result = process("-m", "examples.gan_serve", "--quick", "--folder", str(folder))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "The same 20 images from all three" in result.stdout
    assert (folder / "served" / "saved_model.pb").exists()


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
def test_a_run_does_not_begin_with_networks_that_answer_otherwise(bug, start, tmp_path, monkeypatch, capsys):
    from examples import sagan_torch

    blocks = {block: load(start / files.ATTENTION, block=block) for block in files.BLOCKS}
    networks = files.load_networks(start)
    if bug == "query and key exchanged":
        config, params = blocks["averaged"]
        blocks["averaged"] = (config, swapped(params))
    elif bug == "a kernel turned":
        kernel = networks["averaged.conv2.kernel"]
        networks["averaged.conv2.kernel"] = kernel.swapaxes(0, 1)
    else:
        u = networks["discriminator.conv2.u"]
        networks["discriminator.conv2.u"] = np.full_like(u, u.size**-0.5)
    save_blocks(tmp_path / files.ATTENTION, blocks)
    files.save_networks(tmp_path, networks)
    files.save_samples(tmp_path, files.load_samples(start))
    command = ["sagan_torch", "--quick", "--start", str(tmp_path), "--folder", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", command)
    assert sagan_torch.main() == FAILED
    assert "NOT the same" in capsys.readouterr().out
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("device", "code", "words"),
    [
        ("abacus", 2, "--device: got device 'abacus'; expected one of cpu, cuda"),
        ("", 2, "--device: got device ''; expected one of cpu, cuda"),
        ("cuda:9", 3, "--device: there is no device 'cuda:9' here; there are: cpu:0"),
    ],
)
def test_a_device_that_torch_has_not(device, code, words, monkeypatch, tmp_path, capsys):
    program = pytest.importorskip("examples.sagan_torch")
    folder = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["sagan_torch", "--device", device, "--folder", str(folder)])
    assert program.main() == code
    assert words in capsys.readouterr().err
    assert not folder.exists()
