"""The types that a user's editor and type checker see in the installed packages."""

import ast
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = (Path(__file__).parent / "typed_program.py").read_text(encoding="utf-8")
PACKAGES = [ROOT / "selfattn_core", *sorted((ROOT / "backends").glob("selfattn_*"))]
# pyright would read the sources of a library without py.typed too, and a stricter checker or editor would not.
PYRIGHT = {
    "typeCheckingMode": "standard",
    "useLibraryCodeForTypes": False,
    "reportMissingTypeStubs": "error",
}
# The frameworks are not followed, which takes mypy a minute.
MYPY = """[mypy]
strict = true
[mypy-torch.*,jax.*,flax.*,keras.*,tensorflow.*,matplotlib.*]
follow_imports = skip
"""


def errors(folder: Path, program: str, *, typed: bool = True) -> dict[str, list[str]]:
    """By checker, what it reports on a program in an environment where the packages are installed."""
    venv.create(folder / "environment")
    python = folder / "environment" / "bin" / "python"
    site = folder / "environment" / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", *([] if typed else ["py.typed"]))
        shutil.copytree(package, site / package.name, ignore=ignored)
    (site / "frameworks.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    (folder / "program.py").write_text(program, encoding="utf-8")
    (folder / "pyrightconfig.json").write_text(json.dumps(PYRIGHT), encoding="utf-8")
    (folder / "mypy.ini").write_text(MYPY, encoding="utf-8")
    checkers = {
        "pyright": [Path(sys.executable).parent / "basedpyright", "--pythonpath", python, "program.py"],
        "mypy": [sys.executable, "-m", "mypy", "--python-executable", python, "program.py"],
    }
    found = {}
    for name, command in checkers.items():
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        found[name] = re.findall(r"^.*error: .*$", done.stdout, re.M)
        assert done.returncode == bool(found[name]), done.stdout + done.stderr
    return found


def test_a_users_program_has_the_types_that_it_says(tmp_path):
    assert errors(tmp_path, PROGRAM) == {"pyright": [], "mypy": []}


def test_without_py_typed_both_checkers_report_it(tmp_path):
    program = "import selfattn_core\n\nversion: str = selfattn_core.__version__\n"
    found = errors(tmp_path, program, typed=False)
    assert "Stub file not found" in found["pyright"][0]
    assert "py.typed" in found["mypy"][0]


def public_names(package: Path) -> list[str]:
    """The names in the `__all__` of a package."""
    for node in ast.parse((package / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_the_program_uses_every_public_function(package):
    used = re.findall(r"\b\w+\b", PROGRAM)
    functions = [name for name in public_names(package) if name.islower() and not name.startswith("__")]
    assert [name for name in functions if name not in used] == []
