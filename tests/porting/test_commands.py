"""`selfattn port`, `inspect` and `dialects` as a user runs them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

import selfattn_core
from selfattn_core.cli import main
from selfattn_core.installed import NotInstalledError
from selfattn_core.porting.dialects.catalogue import dialect_names
from tests.porting.checkpoints import io_file, written

OTHERS = ("--from", "biggan", "--to", "biggan")


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def command(*arguments):
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return command


def test_from_a_listing_to_a_file(run, tmp_path):
    path, original = written(tmp_path, "mmcv, use_scale=False")
    found = run("inspect", path.name)
    assert found.exit_code == 0
    assert "mmcv" in found.output
    assert "use_scale" in found.output
    io = io_file(tmp_path, original)
    done = run("port", path.name, "o.safetensors", "--from", "mmcv", "--check", io.name)
    assert done.exit_code == 1
    assert "failed   source's own output" in done.output
    assert not (tmp_path / "o.safetensors").exists()
    done = run(
        "port", path.name, "o.safetensors", "--from", "mmcv", "--check", io.name, "--set", "use_scale=false"
    )
    assert done.exit_code == 0, done.output
    assert "passed   source's own output" in done.output
    assert "as canonical: selfattn's own file, kernels (C_in, C_out): written" in done.output
    assert selfattn_core.load(tmp_path / "o.safetensors")[0].out_projection


def test_json(run, tmp_path):
    path, _ = written(tmp_path, "biggan, ajbrock")
    found = run("inspect", path.name, "--json", "-")
    assert json.loads(found.stdout)["blocks"][0]["prefix"] == "blocks.3.1."
    assert "fits    biggan" in found.stderr
    done = run("port", path.name, "o.npz", *OTHERS, "--json", "report.json", "--dry-run")
    assert done.exit_code == 0
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert content["written"] is False
    assert content["blocks"][0]["tensors"][0]["roles"] == ["query.kernel"]
    done = run("port", path.name, "o.npz", *OTHERS, "--json", "absent/report.json")
    assert done.exit_code == 2
    assert not (tmp_path / "o.npz").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("port", "a.npz", "o.safetensors"), "choose its dialect with --from"),
        (
            ("port", "a.npz", "o.safetensors", "--from", "torchgan"),
            "the softmax runs over the output positions",
        ),
        (("port", "a.npz", "o.safetensors", "--from", "heykeeta"), "did you mean heykeetae"),
        (
            ("port", "a.npz", "o.safetensors", "--from", "absent.toml"),
            "absent.toml: cannot be read as a dialect: no such file.",
        ),
        (("port", "a.npz", "o.safetensors", "--from", "biggan", "--set", "sn_eps"), "expected NAME=VALUE"),
        (
            ("port", "a.npz", "o.safetensors", "--from", "biggan", "--set", "eps=1"),
            "eps is not a setting of this dialect",
        ),
        (("port", "a.npz", "o.safetensors", "--from", "biggan", "--prefix", "x"), "has no block 'x'"),
        (("port", "absent.npz", "o.npz", *OTHERS), "absent.npz: no such file"),
        (("port", "a.npz", "a.npz", *OTHERS), "exists already"),
        (("port", "a.npz", "o.safetensors", "--from", "biggan", "--dtype", "int8"), "int8"),
        (("inspect", "absent.npz"), "absent.npz: no such file"),
        (("inspect", "a.npz", "--from", "biggn"), "is unknown"),
        (("dialects", "biggn"), "did you mean biggan"),
        (("dialects", "BigGAN"), "did you mean biggan"),
        (("inspect", "a.npz", "--json", "a.npz"), "--json a.npz: would replace FILE; name another file."),
        (("inspect", "a.npz", "--json", "./a.npz"), "would replace FILE"),
        (("inspect", "a.npz", "--json", "absent/x.json"), "there is no folder absent"),
        (("inspect", "a.npz", "--json", ""), "the name is empty"),
        (("port", "a.npz", "o.npz", *OTHERS, "--json", "o.npz"), "would replace DST"),
        (("port", "a.npz", "o.npz", *OTHERS, "--json", "a.npz"), "would replace SRC"),
        (("port", "x.npz", "o.npz", *OTHERS, "--check", "a.npz", "--json", "a.npz"), "the file of --check"),
        (("port", "a.npz", "o.npz", *OTHERS, "--json", "."), "--json .: is a folder"),
        (("port", "", "o.npz", *OTHERS), "the path is empty"),
        (("port", "a.npz", "", *OTHERS), "the path is empty"),
        (("inspect", ""), "the path is empty"),
        (("port", "a.npz", "o.npz", "--from", "biggan"), "the canonical form is a .safetensors file"),
    ],
)
def test_a_mistake_is_one_paragraph_and_exit_code_2(run, tmp_path, arguments, message):
    path, _ = written(tmp_path, "biggan, ajbrock")
    path.rename("a.npz")
    before = (tmp_path / "a.npz").read_bytes()
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert "Traceback" not in done.output
    assert "block" not in done.stdout
    assert isinstance(done.exception, SystemExit)
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]
    assert (tmp_path / "a.npz").read_bytes() == before


def test_what_is_not_installed_is_exit_code_3(run, tmp_path, monkeypatch):
    from selfattn_core.porting.formats import write

    path, _ = written(tmp_path, "heykeetae, plain")

    def absent(*arguments):
        raise NotInstalledError(
            "selfattn_core.porting needs torch, which is not installed: pip install 'selfattn[torch]'"
        )

    monkeypatch.setitem(write._FORMATS, "torch", replace(write._FORMATS["torch"], file=absent))
    done = run("port", path.name, "o.pt", "--from", "heykeetae", "--to", "torch")
    assert done.exit_code == 3
    assert "pip install 'selfattn[torch]'" in done.output


def test_dialects_lists_and_prints_what_is_accepted_back(run, tmp_path):
    listing = run("dialects")
    assert listing.exit_code == 0
    for name in dialect_names():
        assert f"\n{name} " in f"\n{listing.output}"
    assert "refused: torchgan" in listing.output
    (tmp_path / "mine.toml").write_text(run("dialects", "studiogan").output, encoding="utf-8")
    path, _ = written(tmp_path, "studiogan, hook")
    done = run("port", path.name, "o.safetensors", "--from", "mine.toml")
    assert done.exit_code == 0, done.output


def test_all_blocks_of_a_network(run, tmp_path):
    _, original = written(tmp_path, "heykeetae, plain")
    local = {key.removeprefix(original.prefix): value for key, value in original.tensors.items()}
    np.savez(tmp_path / "n.npz", **{f"attn{n}.{key}": value for n in (1, 2) for key, value in local.items()})
    done = run(
        "port", "n.npz", "o.safetensors", "--from", "heykeetae", "--prefix", "attn1.", "--prefix", "attn2."
    )
    assert done.exit_code == 0, done.output
    assert selfattn_core.load(tmp_path / "o.safetensors", block="attn2")[1]["gamma"].shape == (1,)
    done = run("port", "n.npz", "p.safetensors", "--from", "heykeetae", "--prefix", "attn*")
    assert done.exit_code == 0
    assert run("inspect", "o.safetensors").output.count("fits    canonical") == 2


def test_tensors_can_be_listed(run, tmp_path):
    path, _ = written(tmp_path, "biggan, ajbrock")
    assert "blocks.3.1.theta.u0 (1, 3) float32" in run("inspect", path.name, "--tensors").output


def test_a_report_is_no_part_of_a_checkpoint_that_is_a_folder_or_has_several_names(run, tmp_path):
    path, _ = written(tmp_path, "biggan, ajbrock")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.npz").hardlink_to(path)
    before = path.read_bytes()
    for source, target in ((path.name, "link.npz"), ("folder", "folder/a.json"), ("model", "model.index")):
        done = run("inspect", source, "--json", target)
        assert done.exit_code == 2
        assert "would replace FILE" in done.output
        assert path.read_bytes() == before
    assert run("inspect", path.name, "--json", "new.json").exit_code == 0


def test_arrays_that_are_no_numbers_are_left_out_of_an_npz(run, tmp_path):
    path, _ = written(tmp_path, "biggan, ajbrock")
    assert run("port", path.name, "o.npz", *OTHERS).exit_code == 0
    with np.load(tmp_path / "o.npz") as arrays:
        held = dict(arrays)
    kernels = [key for key in held if key.endswith("theta.weight")]
    np.savez(tmp_path / "a.npz", **held, names=np.array(["a"]), any=np.array([print], dtype=object))
    found = run("inspect", "a.npz")
    assert found.exit_code == 0, found.output
    assert "left out, since they are not numbers: __metadata__.json, names, any" in found.output
    assert run("port", "a.npz", "o.safetensors", "--from", "biggan").exit_code == 0
    held |= {key: np.array([print], dtype=object) for key in kernels}
    np.savez(tmp_path / "b.npz", **held)
    done = run("port", "b.npz", "p.safetensors", "--from", "biggan")
    assert done.exit_code == 2
    assert "theta.weight.npy: holds Python objects, which only unpickling could read" in done.output


def test_a_built_in_dialect_that_is_named_is_listed_once(run, tmp_path):
    path, _ = written(tmp_path, "heykeetae, plain")
    assert run("inspect", path.name, "--from", "heykeetae").output.count(" heykeetae: ") == 1
