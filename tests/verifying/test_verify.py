"""`verify` on functions that stand in for files: what it passes, what it finds wrong, and what it says of it."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from selfattn_core import SelfAttentionConfig, save
from selfattn_core.cli import main
from selfattn_core.conformance.cases.case import Case
from selfattn_core.conformance.cases.inputs import inputs
from selfattn_core.params import refresh_spectral_norm
from selfattn_core.porting import port
from selfattn_core.verifying import VerifyError, process, verify
from selfattn_core.verifying import verify as verify_function
from selfattn_core.verifying.containers import CONTAINERS
from selfattn_core.verifying.process import CrashedError, Process

ROOT = Path(__file__).parents[2]
CONFIG = SelfAttentionConfig(16, qk_channels=3, value_channels=5, out_projection=True)
FUNCTIONS = "tests.verifying.functions"


@pytest.fixture
def weights(tmp_path, monkeypatch) -> Path:
    return stored(tmp_path / "layer.safetensors", CONFIG, monkeypatch)


def stored(path: Path, config: SelfAttentionConfig, monkeypatch) -> Path:
    """A layer in a file, and the functions told of it."""
    params = inputs(Case("", "forward", "", config), "float32").params
    save(path, config, refresh_spectral_norm(config, params) if config.spectral_norm else params)
    monkeypatch.setenv("SELFATTN_TEST_WEIGHTS", str(path))
    monkeypatch.chdir(ROOT)
    return path


def verified(name: str, weights: Path, **options):
    options = {"layout": "channels_last", "size": (4, 5)} | options
    return verify_function(f"{FUNCTIONS}:{name}", weights, **options)


@pytest.mark.parametrize("pool", [1, 3])
def test_a_right_function_of_open_sizes(tmp_path, monkeypatch, pool):
    config = SelfAttentionConfig(16, kv_pool=pool, spectral_norm=True)
    report = verified("right", stored(tmp_path / "layer.safetensors", config, monkeypatch), size=None)
    assert report.passed
    assert 0 < report.worst < 8
    assert not report.diagnosis
    sizes = {finding.question.partition(",")[0] for finding in report.findings}
    assert len(sizes) == 4, "small, square, wide, and one of several blocks"
    assert any(height == width for _, height, width in (size.split("×") for size in sizes))
    assert report.findings[-1].question.startswith(report.findings[0].question)


def test_layouts(weights):
    assert verified("channels_first", weights, layout="channels_first").passed
    assert not verified("right", weights, layout="channels_first", size=(16, 16)).passed


def test_the_map_is_compared_where_it_is_among_the_outputs(weights):
    right = verified("with_map", weights, output_name="y", map_name="map")
    assert right.passed
    assert {verdict.quantity for finding in right.findings for verdict in finding.verdicts} == {"y", "map"}
    wrong = verified("with_transposed_map", weights, output_name="y", map_name="map")
    assert not wrong.passed
    assert any(words.startswith("map transposed, y right") for words in wrong.diagnosis)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("slightly_off", "× the noise floor, at most 8 × is allowed"),
        ("rounded_to_16_bits", "× the noise floor, at most 8 × is allowed"),
        ("another_shape", "got shape (2, 3, 5, 16), expected (2, 4, 5, 16)"),
        ("not_a_number", "NaN or infinity where a number was expected"),
        ("gamma_dropped", "× the noise floor"),
        ("clamped", "ValueError: out of range"),
    ],
)
def test_wrong_answers(weights, name, words):
    report = verified(name, weights)
    assert not report.passed
    assert any(words in finding.words for finding in report.findings if not finding.passed)
    assert "is NOT the function of" in report.to_text()


def test_what_is_wrong_is_explained(weights):
    assert verified("gamma_dropped", weights).diagnosis == ("gamma ignored",)
    assert verified("slightly_off", weights).diagnosis == ()


def test_a_single_larger_map_is_explained_and_a_very_large_one_is_said_not_to_be(weights):
    assert verified("gamma_dropped", weights, size=(33, 34)).diagnosis == ("gamma ignored",)
    report = verified("gamma_dropped", weights, size=(50, 49))
    assert report.diagnosis == ()
    assert "no known bug was searched for" in report.notes[0]


def test_a_format_has_its_own_floor(weights):
    assert verified("rounded_to_16_bits", weights, precision="float16").passed
    assert verified("rounded_to_16_bits", weights, precision="int8").passed
    assert not verified("gamma_dropped", weights, precision="int8").passed


def test_answers_are_the_same_at_the_end(weights):
    report = verified("remembers", weights)
    assert [finding.passed for finding in report.findings] == [True] * (len(report.findings) - 1) + [False]


def test_sizes_that_a_file_refuses_are_told_and_are_no_wrong_answers(weights):
    report = verified("even_sizes_only", weights, size=None)
    assert report.passed
    assert 0 < len(report.answered) < len(report.findings)
    assert "that it takes; it refuses" in report.headline
    assert "refused: ValueError: even sizes only, got (2, 3, 5, 16)" in report.to_text()
    with pytest.raises(VerifyError, match=r"opens it and answers nothing: ValueError: even sizes only"):
        verified("even_sizes_only", weights, size=(3, 4))


def test_a_crash_is_an_answer(weights):
    report = verified("crashes_once", weights)
    assert [finding.passed for finding in report.findings] == [False] + [True] * (len(report.findings) - 1)
    assert "the runtime did not answer: its process died by signal 9" in report.findings[0].words


def test_a_crash_at_one_size_is_no_refusal(weights):
    report = verified("crashes_on_large_maps", weights, size=None)
    assert not report.passed
    assert any("died by signal 9" in finding.words and not finding.refused for finding in report.findings)


def test_a_process_that_goes_away_between_two_inputs(weights):
    target = f"{FUNCTIONS}:dies_after_its_answer"
    with Process(CONTAINERS["callable"].runtimes[0], target) as running:
        running.open()
        x = np.ones((1, 2, 2, 16), np.float32)
        assert not running.ask(x, "float32", "x", ("y",)).error
        running.process.wait()
        late = running.ask(x, "float32", "x", ("y",))
        assert "the runtime did not answer: its process exited with code 0" in late.error
        assert not running.ask(x, "float32", "x", ("y",)).error, "it is started again"


def test_children_of_a_runtime_end_with_it(weights):
    began = time.monotonic()
    with Process(CONTAINERS["callable"].runtimes[0], f"{FUNCTIONS}:forks") as running:
        running.open()
        assert not running.ask(np.ones((1, 2, 2, 16), np.float32), "float32", "x", ("y",)).error
        group = running.process.pid
    assert time.monotonic() - began < 60
    while is_alive(group):
        assert time.monotonic() - began < 60
        time.sleep(0.05)


def test_a_runtime_that_hangs_ends_with_who_asked_it(weights, tmp_path):
    """Whoever is killed can end nobody."""
    with Process(CONTAINERS["callable"].runtimes[0], f"{FUNCTIONS}:hangs") as running:
        running.open()
        np.save(running.folder / "x.npy", np.ones((1, 2, 2, 16), np.float32))
        running.process.stdin.write('{"dtype": "float32", "input": "x", "outputs": ["y"]}\n')
        running.process.stdin.close()
        assert running.process.wait(timeout=60) == 0


def is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_runtime_that_does_not_come_to_an_end(weights, monkeypatch):
    with Process(CONTAINERS["callable"].runtimes[0], f"{FUNCTIONS}:hangs", seconds=1) as running:
        running.open()
        answer = running.ask(np.ones((1, 2, 2, 16)), "float32", "x", ("y",))
        assert "gave no answer in 1 s and was ended" in answer.error
    monkeypatch.setattr(process, "_OPENING_SECONDS", 0.001)
    with (
        Process(CONTAINERS["callable"].runtimes[0], f"{FUNCTIONS}:hangs") as running,
        pytest.raises(CrashedError, match=r"gave no answer in 0\.001 s"),
    ):
        running.open()


def test_what_a_runtime_prints_is_no_answer(weights):
    assert verified("talks", weights).passed


def test_weights_that_hide_the_attention(tmp_path, monkeypatch):
    path = tmp_path / "layer.safetensors"
    params = inputs(Case("", "forward", "", CONFIG), "float32").params
    save(path, CONFIG, params | {"gamma": np.zeros(1, np.float32)})
    monkeypatch.setenv("SELFATTN_TEST_WEIGHTS", str(path))
    monkeypatch.chdir(ROOT)
    report = verified("right", path)
    assert report.passed
    assert report.notes[0].startswith("gamma is 0")
    save(path, CONFIG, params | {"gamma": np.full(1, 1e-9, np.float32)}, overwrite=True)
    assert "nothing was learnt about it" in verified("right", path).notes[0]


def test_features_of_the_users_own(weights, tmp_path):
    x = np.random.default_rng(3).standard_normal((16, 3, 7)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    report = verified(
        "channels_first", weights, layout="channels_first", size=None, features=tmp_path / "x.npy"
    )
    assert report.passed
    assert [finding.question.partition(",")[0] for finding in report.findings] == ["1×3×7"] * 2
    np.save(tmp_path / "x.npy", np.stack([x, x + 1]))
    options = {"layout": "channels_first", "size": None, "features": tmp_path / "x.npy"}
    with pytest.raises(ValueError, match="holds a batch of 2"):
        verified("channels_first", weights, **options)
    assert verified("channels_first", weights, sample=1, **options).passed


@pytest.mark.parametrize(
    ("artifact", "options", "words"),
    [
        ("absent.onnx", {}, "absent.onnx: no such file or folder"),
        ("layer.bin", {}, "its name does not say what format it is"),
        ("layer.mlpackage", {}, "Core ML runs on macOS alone"),
        ("layer.onnx", {"container": "nonsense"}, "container 'nonsense': expected one of onnx, litert"),
        ("layer.onnx", {"runtime": "tvm"}, "ONNX files are run by onnxruntime, openvino"),
        ("layer.onnx", {"layout": "NHWC"}, "layout 'NHWC': expected channels_last or channels_first"),
        ("layer.onnx", {"precision": "int4"}, "precision 'int4': expected one of float64, float32"),
        ("layer.onnx", {"size": (3, 4), "features": "x.npy"}, "pass only one of the two"),
        (f"{FUNCTIONS}:right", {}, "a function does not say its layout"),
        (f"{FUNCTIONS}:absent", {"layout": "channels_last"}, "has no attribute 'absent'"),
        (f"{FUNCTIONS}:not_callable", {"layout": "channels_last"}, "expected a function from maps to maps"),
        ("tests.absent:right", {"layout": "channels_last"}, "No module named 'tests.absent'"),
        (
            f"{FUNCTIONS}:right",
            {"layout": "channels_last", "size": (100_000, 100)},
            "export for a smaller map, or with open sizes",
        ),
    ],
)
def test_what_cannot_be_asked(weights, tmp_path, monkeypatch, artifact, options, words):
    for name in ("layer.bin", "layer.mlpackage", "layer.onnx"):
        (tmp_path / name).write_bytes(b"no such thing")
    if "." in artifact and ":" not in artifact:
        artifact = str(tmp_path / artifact)
    with pytest.raises(VerifyError) as caught:
        verify(artifact, weights, **options)
    assert words in str(caught.value)


def test_a_map_smaller_than_the_window(tmp_path, monkeypatch):
    config = SelfAttentionConfig(16, kv_pool=4)
    path = stored(tmp_path / "layer.safetensors", config, monkeypatch)
    with pytest.raises(VerifyError, match=r"3×9 positions hold no pooling window of 4×4"):
        verified("right", path, size=(3, 9))


def test_a_runtime_that_is_not_installed(weights, tmp_path, monkeypatch):
    # Of the package the name `verify` is the function.
    module = __import__("sys").modules["selfattn_core.verifying.verify"]
    monkeypatch.setattr(module, "missing_modules", list)
    (tmp_path / "layer.onnx").write_bytes(b"")
    done = CliRunner().invoke(main, ["verify", str(tmp_path / "layer.onnx"), str(weights)])
    assert done.exit_code == 3
    assert "is run by onnxruntime, and onnxruntime, onnx is not installed: pip install onnxruntime onnx" in (
        done.output
    )


def test_the_command(weights, tmp_path):
    common = [str(weights), "--layout", "channels_last", "--size", "4x5"]
    done = CliRunner().invoke(main, ["verify", f"{FUNCTIONS}:right", *common, "--json", "-"])
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    assert content["passed"]
    assert content["findings"][0]["ratios"]["y"] > 0
    assert "is the function of" in done.stderr
    page = tmp_path / "report.html"
    done = CliRunner().invoke(main, ["verify", f"{FUNCTIONS}:not_a_number", *common, "--html", str(page)])
    assert done.exit_code == 1, done.output
    assert "NaN or infinity" in page.read_text(encoding="utf-8")
    done = CliRunner().invoke(main, ["verify", f"{FUNCTIONS}:right", str(tmp_path / "no.safetensors")])
    assert done.exit_code == 2
    done = CliRunner().invoke(main, ["verify", f"{FUNCTIONS}:right", *common[:-1], "4 by 5"])
    assert "expected HxW in positions" in done.output


def test_weights_of_anybody(tmp_path, monkeypatch):
    own = stored(tmp_path / "layer.safetensors", SelfAttentionConfig(16), monkeypatch)
    port(own, tmp_path / "net.npz", to="heykeetae")
    assert verified("right", tmp_path / "net.npz", dialect="heykeetae").passed
    done = CliRunner().invoke(main, ["verify", f"{FUNCTIONS}:right", str(own), "--prefix", "a"])
    assert done.exit_code == 2
    assert "name its dialect with --from" in " ".join(done.output.split())


def test_weights_with_unused_tensors_can_be_allowed_as_the_error_advises(tmp_path, monkeypatch):
    own = stored(tmp_path / "layer.safetensors", SelfAttentionConfig(16), monkeypatch)
    port(own, tmp_path / "net.npz", to="heykeetae")
    stray = tmp_path / "stray.npz"
    np.savez(stray, **np.load(tmp_path / "net.npz"), **{"norm.weight": np.ones(16)})
    with pytest.raises(ValueError, match="pass strict=False"):
        verified("right", stray, dialect="heykeetae")
    assert verified("right", stray, dialect="heykeetae", strict=False).passed
    options = ["--from", "heykeetae", "--layout", "channels_last", "--size", "4x5"]
    command = ["verify", f"{FUNCTIONS}:right", str(stray), *options]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 2
    assert "pass --allow-unused" in " ".join(refused.output.split())
    done = CliRunner().invoke(main, [*command, "--allow-unused"])
    assert done.exit_code == 0, done.output


def test_the_page_lists_every_container_and_runtime():
    page = (ROOT / "docs" / "verify.md").read_text(encoding="utf-8")
    for container in CONTAINERS.values():
        for name in (*container.suffixes, *(runtime.name for runtime in container.runtimes)):
            assert f"`{name}`" in page or name in (".mlpackage", ".mlmodel", ".mlmodelc", "python")
