"""The wheel, installed into an environment with nothing else in it."""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"selfattn_core", "selfattn_ops", "selfattn_torch", "selfattn_keras", "selfattn_flax"}


def run(*command: str | Path, check: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # Not in the checkout, which `python -c` would import the packages from.
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tempfile.gettempdir(),
        check=check,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of an environment that holds the wheel and what the wheel itself depends on."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder, check=True)
    python = folder / "bin" / "python"
    installed = run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
    assert installed.returncode == 0, installed.stderr
    return python


def test_the_wheel_holds_the_five_packages_and_nothing_else(wheel):
    names = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == PACKAGES
    files = set(zipfile.ZipFile(wheel).namelist())
    assert {f"{package}/py.typed" for package in PACKAGES} <= files
    dialects = {path.name for path in (ROOT / "selfattn_core" / "porting" / "data").glob("*.toml")}
    assert dialects
    assert {f"selfattn_core/porting/data/{name}" for name in dialects} <= files


def test_installed_it_shows_the_five_names(python):
    script = (
        "import pathlib, sysconfig; site = pathlib.Path(sysconfig.get_path('purelib'));"
        "print(*sorted(p.name for p in site.iterdir() if p.name.startswith(('selfattn_', 'backends', 'tests', "
        "'examples', 'benchmarks'))))"
    )
    assert set(run(python, "-c", script, check=True).stdout.split()) == PACKAGES
    assert run(python, "-c", "import backends").returncode != 0


@pytest.mark.parametrize(
    ("package", "message"),
    [
        (
            "selfattn_torch",
            "selfattn_torch needs torch, which is not installed: pip install 'selfattn[torch]'",
        ),
        ("selfattn_keras", "selfattn_keras needs keras"),
        ("selfattn_flax", "selfattn_flax needs"),
    ],
)
def test_an_adapter_without_its_framework_says_what_to_install(python, package, message):
    result = run(python, "-c", f"import {package}")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: ")
    assert message in last
    assert "pip install 'selfattn[" in last


def test_the_core_works_without_any_framework(python):
    script = (
        "import numpy as np; from selfattn_core import SelfAttentionConfig, init_params, spec;"
        "c = SelfAttentionConfig(8); x = np.ones((1, 2, 3, 8), np.float32);"
        "print((spec.forward(c, init_params(c, seed=0), x) == x).all())"
    )
    assert run(python, "-c", script, check=True).stdout.strip() == "True"


def test_the_command_ports_without_any_framework(python, tmp_path):
    command = python.parent / "selfattn"
    assert "brain-research" in run(command, "dialects", check=True).stdout
    script = f"""
import numpy as np
make = np.random.default_rng(0).standard_normal
arrays = {{f"attn.{{n}}.weight": make((o, i, 1, 1)) for n, o, i in (("theta", 2, 16), ("phi", 2, 16), ("g", 8, 16), ("o", 16, 8))}}
np.savez({str(tmp_path / "a.npz")!r}, **arrays, **{{"attn.gamma": make(())}})
"""
    run(python, "-c", script, check=True)
    done = run(command, "port", tmp_path / "a.npz", tmp_path / "b.safetensors", "--from", "biggan")
    assert done.returncode == 0, done.stderr
    assert "read back as canonical: the same config and bits" in done.stdout


def test_the_command_reports_what_is_missing(python):
    command = python.parent / "selfattn"
    listing = run(command, "backends", check=True).stdout
    assert "pip install 'selfattn[torch]'" in listing
    result = run(command, "conform", "torch")
    assert result.returncode == 3
    assert "torch not installed: pip install 'selfattn[torch]'" in result.stdout


def test_a_bfloat16_file_is_read_without_ml_dtypes(python, tmp_path):
    script = f"""
import json, numpy as np, struct
from selfattn_core import SelfAttentionConfig, init_params, load
config = SelfAttentionConfig(8)
params = init_params(config, seed=0)
header, body = {{"__metadata__": {{"format": "selfattn", "version": "1", "config": json.dumps(config.to_dict())}}}}, b""
for name, array in params.items():
    bits = (array.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    header[name] = {{"dtype": "BF16", "shape": array.shape, "data_offsets": [len(body), len(body) + len(bits)]}}
    body += bits
text = json.dumps(header).encode()
open({str(tmp_path / "b.safetensors")!r}, "wb").write(struct.pack("<Q", len(text)) + text + body)
back = load({str(tmp_path / "b.safetensors")!r})[1]
want = (params["query.kernel"].view(np.uint32) >> 16 << 16).view(np.float32)
assert back["query.kernel"].dtype == np.float32 and (back["query.kernel"] == want).all()
"""
    result = run(python, "-c", script)
    assert result.returncode == 0, result.stderr
