"""The digits example: the numpy model against torch, the files, the comparison, and the program around them."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from examples import command
from examples.digits import __main__ as program
from examples.digits import compare, data, files, frameworks, numpy_model, picture
from examples.digits.frameworks import PROGRAMS, Answer
from selfattn_core import SelfAttentionConfig, parameter_table, save
from selfattn_core.conformance.backends import REGISTRY
from tests.support import BACKENDS

ROOT = Path(__file__).parents[2]
CONFIG = SelfAttentionConfig(32)


@pytest.fixture
def held_out():
    generator = np.random.default_rng(1)
    images = generator.integers(0, 17, (20, 8, 8, 1)) / 16
    return data.Digits(images.astype(np.float32), generator.integers(0, 10, 20))


@pytest.fixture
def folder(tmp_path, held_out):
    """The files of a classifier with random weights, none of which is zero."""
    generator = np.random.default_rng(0)

    def draw(shape):
        fan_in = max(1, int(np.prod(shape[:-1])))
        return (generator.standard_normal(shape) * np.sqrt(2 / fan_in)).astype(np.float32)

    save(
        tmp_path / files.ATTENTION,
        CONFIG,
        {name: draw(row.shape) for name, row in parameter_table(CONFIG).items()},
    )
    files.save_network(tmp_path, {name: draw(shape) for name, shape in files.NETWORK.items()})
    np.save(tmp_path / files.IMAGES, held_out.images)
    return tmp_path


@pytest.fixture
def model(folder):
    return numpy_model.load(folder)


def judged(model, held_out, answer):
    return compare.compare(answer, compare.expect(model, held_out.images), held_out)


def environment():
    """For a process that imports what this one imports, wherever the packages come from."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def test_the_two_sets_of_digits_share_no_image_and_are_always_the_same():
    training, held_out = data.load()
    assert (len(training), len(held_out)) == (1437, 360)
    assert training.images.shape == (1437, 8, 8, 1)
    assert training.images.dtype == np.float32
    assert (training.images.min(), training.images.max()) == (0, 1)
    seen = {image.tobytes() for image in training.images}
    assert not any(image.tobytes() in seen for image in held_out.images)
    assert np.array_equal(data.load()[1].labels, held_out.labels)


def test_the_numpy_model_is_the_torch_model(folder, model, held_out):
    from examples.digits import torch_model

    logits = torch_model.logits(torch_model.load(folder), held_out.images)
    row = judged(model, held_out, Answer("torch", logits))
    assert not row.problem
    assert row.ratio < 8
    wide = torch_model.load(folder).double()
    want = model.astype("float64")(held_out.images)
    np.testing.assert_allclose(
        torch_model.logits(wide, held_out.images.astype(np.float64)),
        want,
        rtol=0,
        atol=1e-12 * np.abs(want).max(),
    )


def test_torch_weights_come_back_from_the_files_bit_for_bit(folder, tmp_path_factory):
    import torch

    from examples.digits import torch_model

    model = torch_model.load(folder)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    torch_model.save(model, elsewhere, source="a test")
    twin = torch_model.load(elsewhere)
    assert all(torch.equal(tensor, twin.state_dict()[name]) for name, tensor in model.state_dict().items())
    first, second = files.load_network(folder), files.load_network(elsewhere)
    assert all(np.array_equal(first[name], second[name]) for name in files.NETWORK)


def test_a_misshapen_network_is_refused(folder):
    network = files.load_network(folder)
    with pytest.raises(ValueError, match=r"network.safetensors: got .*expected"):
        files.save_network(folder, network | {"dense.kernel": network["dense.kernel"].T})


def test_the_picture_shows_three_digits_and_replaces_an_earlier_one(model, tmp_path):
    from PIL import Image

    generator = np.random.default_rng(2)
    images = generator.uniform(size=(20, 8, 8, 1)).astype(np.float32)
    held_out = data.Digits(images, np.arange(20) % 10)
    target = tmp_path / files.PICTURE
    target.write_text("earlier", encoding="utf-8")
    picture.draw(model, held_out, target)
    with Image.open(target) as drawn:
        assert drawn.height > drawn.width > 500


def test_every_framework_of_the_library_is_asked():
    assert list(PROGRAMS) == list(REGISTRY)


@pytest.mark.parametrize("framework", BACKENDS)
def test_every_framework_agrees_in_its_own_process(framework, folder, model, held_out, monkeypatch):
    monkeypatch.setattr(os, "environ", environment())
    row = judged(model, held_out, frameworks.ask(framework, folder))
    assert not row.problem
    assert row.ratio < 8


def scaled(model):
    """The scale that SAGAN's attention does not have."""
    return {
        "query.kernel": model.attention["query.kernel"] / 2,
        "query.bias": model.attention["query.bias"] / 2,
    }


def swapped(model):
    """Query and key mixed up, as f and g are in much code."""
    return {
        f"{name}.{part}": model.attention[f"{other}.{part}"]
        for name, other in (("query", "key"), ("key", "query"))
        for part in ("kernel", "bias")
    }


PLANTED = {
    "attention scaled by 1/sqrt(d)": scaled,
    "query and key swapped": swapped,
    "value bias lost": lambda model: {"value.bias": model.attention["value.bias"] * 0},
    "gamma lost": lambda model: {"gamma": model.gamma * 0},
    "gamma off by 1 in 10 000": lambda model: {"gamma": model.gamma * np.float32(1 + 1e-4)},
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug, model, held_out):
    broken = numpy_model.Classifier(model.config, model.attention | PLANTED[bug](model), model.network)
    row = judged(model, held_out, Answer("keras-jax", broken(held_out.images)))
    assert row.ratio > 8
    assert "allowed" in row.problem or "cap" in row.problem
    assert "DISAGREES" in compare.table([row], compare.expect(model, held_out.images), held_out)


def test_a_process_that_reads_other_weights_is_found(folder, model, held_out, monkeypatch):
    monkeypatch.setattr(os, "environ", environment())
    shifted = model.attention | {"value.bias": model.attention["value.bias"] + np.float32(1e-3)}
    save(folder / files.ATTENTION, CONFIG, shifted, overwrite=True)
    row = judged(model, held_out, frameworks.ask("torch", folder))
    assert row.ratio > 8
    assert program._conclude([row], 1.0) == program.FAILED


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda logits: logits[:-1], "shape"),
        (lambda logits: logits.astype(np.float64), "dtype"),
        (lambda logits: np.where(logits == logits.max(), np.nan, logits), "NaN"),
    ],
)
def test_unusable_logits_are_a_failure(spoil, message, model, held_out):
    row = judged(model, held_out, Answer("torch", spoil(model(held_out.images))))
    assert message in row.problem
    assert row.accuracy is None


def test_a_missing_framework_is_said_and_not_agreed(folder, model, held_out, monkeypatch, capsys):
    monkeypatch.setattr(frameworks, "missing_modules", lambda _: ["flax"])
    row = judged(model, held_out, frameworks.ask("flax-nnx", folder))
    assert row.missing
    assert "MISSING: flax not installed: pip install 'selfattn[flax]'" in compare.table(
        [row], compare.expect(model, held_out.images), held_out
    )
    good = judged(model, held_out, Answer("torch", model(held_out.images)))
    assert program._conclude([good], 1.0) == 0
    assert program._conclude([good, row], 1.0) == program.MISSING
    assert "flax-nnx could not be asked" in capsys.readouterr().err


def test_a_wrong_framework_wins_over_a_missing_one(model, held_out, capsys):
    good = judged(model, held_out, Answer("torch", model(held_out.images)))
    wrong = dataclasses.replace(good, framework="keras-jax", problem="off")
    missing = judged(model, held_out, Answer("flax-nnx", problem="flax not installed", missing=True))
    assert program._conclude([good, wrong, missing], 1.0) == program.FAILED
    assert "keras-jax did not agree" in capsys.readouterr().err


def test_the_answer_of_an_earlier_run_does_not_count(folder, model, held_out, monkeypatch):
    np.save(files.logits_file(folder, "torch"), model(held_out.images))
    monkeypatch.setitem(frameworks.PROGRAMS, "torch", "examples.digits.no_such_program")
    monkeypatch.setattr(os, "environ", environment())
    answer = frameworks.ask("torch", folder)
    assert answer.logits is None
    assert "no_such_program" in answer.problem
    assert "exit code 1" in answer.problem


def test_a_training_that_falls_short_fails_loudly(tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "examples.digits", "--epochs", "1", "--folder", str(tmp_path)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert process.returncode == program.FAILED
    assert "epoch  1/1: loss" in process.stdout
    assert "FAILED: the training fell short" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_an_interrupt_ends_it_without_a_traceback(tmp_path):
    # A shell's background job, and so this test in it, may have been started with interrupts ignored. They are allowed
    # again by the new process itself: between fork and exec, JAX in this process would warn.
    script = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('examples.digits', run_name='__main__', alter_sys=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, "--epochs", "1000", "--folder", str(tmp_path)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert any("epoch" in line for line in process.stdout), process.stderr.read()
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == command.INTERRUPTED
    assert "Interrupted." in errors
    assert "Traceback" not in errors
