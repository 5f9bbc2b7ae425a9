"""Folders, packages, extras, the registry of backends and the import rules are in step."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import selfattn_core
from selfattn_core.conformance import REGISTRY

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
EXTRAS = PROJECT["project"]["optional-dependencies"]
FRAMEWORKS = {"torch", "tensorflow", "jax", "keras", "flax"}


def folders(root: Path = ROOT) -> list[str]:
    found = ["selfattn_core", *(f"backends/{path.name}" for path in sorted((root / "backends").iterdir()))]
    return [path for path in found if not path.endswith("__pycache__")]


def test_every_folder_of_backends_is_a_package_of_the_wheel():
    assert sorted(folders()) == sorted(PACKAGES)
    assert not (ROOT / "backends" / "__init__.py").exists()


@pytest.mark.parametrize(
    "file",
    ["README.md", "selfattn.py", "Makefile", "mkdocs.yml", "golden-vectors/SHA256SUMS", "docs/hooks.py"],
)
def test_the_sdist_holds_what_tests_and_pages_are_made_from(file):
    assert (ROOT / file).is_file()
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert f"/{Path(file).parts[0]}" in included


def test_an_empty_folder_is_noticed(tmp_path):
    (tmp_path / "backends" / "selfattn_other").mkdir(parents=True)
    assert sorted(folders(tmp_path)) != sorted(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_typed_and_has_an_init(package):
    assert (ROOT / package / "py.typed").exists()
    assert (ROOT / package / "__init__.py").exists()


LAYER = {"layer", "weights", "maps", "with_map"}
ADAPTER = {"__init__", "projection", "spectral_norm", "conformance", "converting"}
CONFORMANCE = {"__init__", "backend", "model", "mutants"}
CONVERTING = {"__init__", "conversion", "foreign", "obstacles", "tensors"}
OPS = {"__init__", "blocks", "dense", "products"}

# What every folder of a kind holds, and what one holds beside or without it, each with its reason.
SHAPES = {
    "selfattn_torch": ADAPTER
    | LAYER
    # Torch calls the layer with whatever it is given, and hands it the state dicts of older versions. One process of
    # several has to be told about the others.
    | {"inputs", "migrate", "parallel"},
    "selfattn_keras": ADAPTER | LAYER,
    # Two layers: a folder for each, and what they share.
    "selfattn_flax": ADAPTER | {"nnx", "linen", "functions", "trees"},
    "selfattn_flax/nnx": {"__init__"} | LAYER,
    # `convert` knows NNX models; the parts of a Linen module cannot be replaced.
    "selfattn_flax/linen": {"__init__"} | LAYER - {"with_map"},
    # Torch differentiates the right implementations that are plain operations, and has a backend of several processes.
    "selfattn_torch/conformance": CONFORMANCE | {"right", "rows", "ranks", "broken_rows"},
    # The same functions on each framework that Keras runs on.
    "selfattn_keras/conformance": CONFORMANCE | {"tensorflow", "jax", "torch"},
    # The pure functions that JAX compiles, and the two layers as such.
    "selfattn_flax/conformance": CONFORMANCE | {"functions", "nnx", "linen"},
    # Torch names the modules of a model, copies them and differentiates by itself.
    "selfattn_torch/converting": CONVERTING,
    "selfattn_keras/converting": CONVERTING | {"places", "answers", "copying"},
    "selfattn_flax/converting": CONVERTING | {"places", "answers"},
    # Torch and TensorFlow have derivatives of ours; JAX differentiates the blocks itself.
    # Torch alone keeps subnormal weights, which are slow, and computes small maps with derivatives in other dtypes.
    "selfattn_ops/torch": OPS | {"derivatives", "autograd", "compiled", "peaked", "kept"},
    "selfattn_ops/tensorflow": OPS | {"derivatives", "autograd", "sizes"},
    "selfattn_ops/jax": OPS,
}


def files_of(folder: Path) -> set[str]:
    """The modules and packages in a folder."""
    inner = {path.parent.name for path in folder.glob("*/__init__.py")}
    return {path.stem for path in folder.glob("*.py")} | inner


@pytest.mark.parametrize("folder", SHAPES)
def test_folders_of_a_kind_have_the_same_files(folder):
    assert files_of(ROOT / "backends" / folder) == SHAPES[folder]


def test_every_adapter_has_a_shape_and_a_registered_backend():
    adapters = {Path(package).name for package in PACKAGES} - {
        "selfattn_core",
        "selfattn_ops",
        "selfattn_runtimes",
    }
    assert {entry.target.partition(".")[0] for entry in REGISTRY.values()} == adapters
    for adapter in adapters:
        inner = {f"{adapter}/{name}" for name in ("conformance", "converting")}
        assert {adapter} | inner <= set(SHAPES)


def test_extras():
    on_keras = {name for name in REGISTRY if name.startswith("keras-")}
    assert set(EXTRAS) == FRAMEWORKS | on_keras | {"viz", "search", "all"}
    assert set(EXTRAS["all"][0].removeprefix("selfattn[").removesuffix("]").split(",")) == FRAMEWORKS | {
        "viz",
        "search",
    }


def resolved(extra: str) -> set[str]:
    """The distributions that an extra installs beside the wheel's own."""
    names = set()
    for requirement in EXTRAS[extra]:
        if requirement.startswith("selfattn["):
            for other in requirement.removeprefix("selfattn[").removesuffix("]").split(","):
                names |= resolved(other)
        else:
            names.add(requirement.partition(">")[0])
    return names


@pytest.mark.parametrize("name", REGISTRY)
def test_the_extra_of_a_backend_installs_what_it_requires_and_no_other_framework(name):
    entry = REGISTRY[name]
    assert resolved(entry.extra) == set(entry.requires)


def test_keras_alone_is_keras_on_its_default():
    assert resolved("keras") == {"keras", "tensorflow"}


def test_there_is_one_version():
    assert "version" in PROJECT["project"]["dynamic"]
    assert selfattn_core.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_says_the_version(package):
    """The ops without any framework: their package imports none."""
    name = Path(package).name
    script = (
        f"import sys, {name}; print({name}.__version__); print(*sorted({FRAMEWORKS!r} & set(sys.modules)))"
    )
    said, *loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    assert said == selfattn_core.__version__
    assert not loaded or name not in ("selfattn_core", "selfattn_ops", "selfattn_runtimes")


def modules_imported(path: Path) -> set[str]:
    """The dotted names that a file imports, and those that may be a module or something inside one."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def imported(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in modules_imported(path)}


ALLOWED = {
    "selfattn_core": set(),
    "selfattn_ops": {"selfattn_core", "torch", "jax", "tensorflow"},
    # A file of Keras names the layer that it needs.
    "selfattn_runtimes": {"selfattn_core", "selfattn_keras", "torch", "jax", "tensorflow", "keras"},
    "selfattn_torch": {"selfattn_core", "selfattn_ops", "torch"},
    "selfattn_keras": {"selfattn_core", "selfattn_ops", "keras", "torch", "jax", "tensorflow"},
    "selfattn_flax": {"selfattn_core", "selfattn_ops", "flax", "jax"},
}


@pytest.mark.parametrize("package", PACKAGES)
def test_who_imports_whom(package):
    name = Path(package).name
    ours = set(ALLOWED) | FRAMEWORKS
    for path in (ROOT / package).rglob("*.py"):
        strangers = (imported(path) & ours) - ALLOWED[name] - {name}
        assert not strangers, f"{path.relative_to(ROOT)} imports {strangers}"


def test_files_of_the_ops_import_their_own_framework_only():
    for path in (ROOT / "backends" / "selfattn_ops").rglob("*.py"):
        assert imported(path) & FRAMEWORKS <= {path.stem, path.parent.name}


ROOMS = ("files", "viz", "conformance", "porting", "verifying", "cli")
"""The folders of selfattn_core. Each uses itself and those before it, whatever files beside them lie between."""


def uses_inside(package: Path) -> dict[str, set[str]]:
    """The folders and files of a package, each with those that it imports, at the top of a module or in a function."""
    parts = {path.stem: [path] for path in package.glob("*.py")}
    parts |= {path.parent.name: sorted(path.parent.rglob("*.py")) for path in package.glob("*/__init__.py")}
    prefix = f"{package.name}."
    return {
        part: {
            name.removeprefix(prefix).partition(".")[0]
            for path in paths
            for name in modules_imported(path)
            if name.startswith(prefix)
        }
        & (set(parts) - {part})
        for part, paths in parts.items()
    }


def reached(part: str, uses: dict[str, set[str]]) -> set[str]:
    """What a part imports, directly or through others."""
    found: set[str] = set()
    waiting = [part]
    while waiting:
        new = uses[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def test_every_folder_of_the_core_has_its_place_in_the_order():
    assert {path.parent.name for path in (ROOT / "selfattn_core").glob("*/__init__.py")} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_of_the_core_use_only_earlier_ones(room):
    later = ROOMS[ROOMS.index(room) :]
    assert not reached(room, uses_inside(ROOT / "selfattn_core")) & set(later)


def test_a_circle_of_rooms_through_a_file_is_noticed(tmp_path):
    core = tmp_path / "core"
    for room in ("files", "porting"):
        (core / room).mkdir(parents=True)
        (core / room / "__init__.py").touch()
    (core / "files" / "read.py").write_text("def read():\n    from core import features\n")
    (core / "features.py").write_text("from core.porting.formats import npy\n")
    (core / "porting" / "load.py").write_text("import core.files.read\n")
    uses = uses_inside(core)
    assert uses == {"files": {"features"}, "features": {"porting"}, "porting": {"files"}}
    assert reached("files", uses) == {"features", "porting", "files"}
