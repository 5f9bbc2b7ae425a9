"""What the SAGAN programs share: what they refuse before they train, files, the table of numbers, quality."""

import sys

import numpy as np
import pytest

from examples.command import BAD_INPUT, MISSING
from examples.digits import data
from examples.gan import files, journal, program, quality


def refused(monkeypatch, *command):
    monkeypatch.setattr(sys, "argv", ["sagan_torch", *map(str, command)])
    return program.refusal(program.arguments("torch", "", steps=10))


def test_a_run_in_the_folder_is_noticed_before_the_training(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    assert refused(monkeypatch, "--folder", folder) == 0
    assert refused(monkeypatch, "--folder", folder, "--resume") == BAD_INPUT
    assert "holds no run that could be resumed" in capsys.readouterr().err
    (folder / journal.HISTORY).touch()
    assert refused(monkeypatch, "--folder", folder) == BAD_INPUT
    assert "pass --resume to continue it, --overwrite to replace it" in capsys.readouterr().err
    assert refused(monkeypatch, "--folder", folder, "--resume") == 0
    assert refused(monkeypatch, "--folder", folder, "--overwrite") == 0


def test_all_problems_are_said_at_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    options = ("--folder", tmp_path / "file", "--resume", "--start", tmp_path / "none")
    assert refused(monkeypatch, *options) == BAD_INPUT
    said = capsys.readouterr().err
    for problem in ("no run that could be resumed", "not for --resume", "no finished run", "is a file"):
        assert problem in said


def test_what_is_not_installed_is_named(capsys):
    error = ModuleNotFoundError("No module named 'torch'", name="torch")
    assert program.missing(error, "torch") == MISSING
    assert "needs torch: pip install 'selfattn[torch,viz]'" in capsys.readouterr().err


@pytest.mark.parametrize("writer", ["installed", "missing"])
def test_the_table_is_written_with_or_without_a_writer_for_tensorboard(writer, tmp_path, monkeypatch, capsys):
    if writer == "missing":
        monkeypatch.setattr(journal, "missing_modules", list)
    first = journal.Journal(tmp_path)
    for step in range(4):
        first.add(step, {"gamma": 0.1 * step, "loss": 1 / 3})
    first.write()
    assert ("pip install tensorboardX" in capsys.readouterr().out) == (writer == "missing")
    assert (tmp_path / "tensorboard").exists() == (writer == "installed")
    resumed = journal.Journal(tmp_path, 2)
    resumed.add(2, {"gamma": -1.0, "loss": 0.0})
    resumed.write()
    rows = journal.read(tmp_path)
    assert [row["gamma"] for row in rows] == [0.0, 0.1, -1.0]
    assert rows[1] == {"step": 1, "gamma": 0.1, "loss": 1 / 3}


def test_networks_of_other_shapes_are_refused(tmp_path):
    networks = {name: np.zeros(shape, np.float32) for name, shape in files.NETWORKS.items()}
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
