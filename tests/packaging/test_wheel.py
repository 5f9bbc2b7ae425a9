"""The wheel, installed into an environment with nothing else in it."""

import email
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    *("selfattn_core", "selfattn_ops", "selfattn_runtimes"),
    *("selfattn_torch", "selfattn_keras", "selfattn_flax"),
}
# A module that says which packages there are.
NAMES = PACKAGES | {"selfattn.py"}


def run(*command: str | Path, check: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # `python -c` imports from its folder too: not the checkout, nor one where others put a folder called jax.
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=environment,
        cwd=sys.prefix,
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


def test_the_wheel_holds_the_six_packages_the_message_and_nothing_else(wheel):
    names = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == NAMES
    files = set(zipfile.ZipFile(wheel).namelist())
    assert {f"{package}/py.typed" for package in PACKAGES} <= files
    dialects = {
        path.name for path in (ROOT / "selfattn_core" / "porting" / "dialects" / "data").glob("*.toml")
    }
    assert dialects
    assert {f"selfattn_core/porting/dialects/data/{name}" for name in dialects} <= files


def test_installed_it_shows_these_names(python):
    script = (
        "import pathlib, sysconfig; site = pathlib.Path(sysconfig.get_path('purelib'));"
        "print(*sorted(p.name for p in site.iterdir() if p.name.startswith(('selfattn', 'backends', 'tests', "
        "'examples', 'benchmarks')) and p.suffix != '.dist-info'))"
    )
    assert set(run(python, "-c", script, check=True).stdout.split()) == NAMES
    assert run(python, "-c", "import backends").returncode != 0


def test_who_imports_the_name_of_the_distribution_is_told_what_to_import(python):
    result = run(python, "-c", "from selfattn import SelfAttention2d")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: pip installs selfattn under other names: import selfattn_torch")
    # Runtimes of files are the command's, and nothing for a user to import.
    assert set(re.findall(r"selfattn_\w+", last)) == PACKAGES - {"selfattn_runtimes"}


LINK = re.compile(r"\]\(\s*<?([^)>\s]+)|^\s*\[[^\]]+\]:\s*(\S+)|(?:href|src)=[\"']([^\"']+)", re.M)
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)


def broken(text: str) -> list[str]:
    """The links of a Markdown page that lead nowhere unless the repository lies around it."""
    targets = ["".join(found) for found in LINK.findall(FENCED.sub("", text))]
    return [target for target in targets if not target.startswith(("https://", "#"))]


def test_the_page_on_the_package_index_has_no_broken_link(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Description-Content-Type"] == "text/markdown"
    page = metadata.get_payload(decode=True).decode()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert broken(readme)
    assert broken(page) == []
    # The words of the links stay, and code is as it was.
    assert "one file: `selfattn_core/spec.py`." in page
    assert FENCED.findall(page) == FENCED.findall(readme)


@pytest.mark.parametrize(
    "link", ["[a](docs/a.md)", "![a](a.png)", "[a]: docs/a.md", '<img src="a.png">', "[a](http://a.org)"]
)
def test_a_broken_link_is_noticed(link):
    assert broken(f"[b](https://b.org), [c](#c)\n{link}\n")


def test_python_m_is_the_command(python):
    command, module = [
        run(*words, "dialects", "biggan", check=True).stdout
        for words in ([python.parent / "selfattn"], [python, "-m", "selfattn_core"])
    ]
    assert command == module
    assert run(python, "-m", "selfattn_core", "conform", "no-such").returncode == 2
    assert run(python, "-m", "selfattn_core", "--help").stdout.startswith("Usage: selfattn ")


@pytest.mark.parametrize(
    ("package", "message"),
    [
        (
            "selfattn_torch",
            "selfattn_torch needs torch, which is not installed: pip install 'selfattn[torch]'",
        ),
        ("selfattn_keras", "selfattn_keras needs keras"),
        ("selfattn_flax", "selfattn_flax needs"),
        *(
            (
                f"selfattn_ops.{name}",
                f"selfattn_ops.{name} needs {name}, which is not installed: pip install 'selfattn[{name}]'",
            )
            for name in ("torch", "jax", "tensorflow")
        ),
    ],
)
def test_what_lacks_its_framework_says_what_to_install(python, package, message):
    result = run(python, "-c", f"import {package}")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("selfattn_core.installed.NotInstalledError: ")
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
