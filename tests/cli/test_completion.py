"""What the shell is offered after a part of a command line."""

import os
import subprocess
import sys

import click
import pytest
from click.shell_completion import ShellComplete

from selfattn_core.cli import main
from selfattn_core.conformance.backends import KNOWN
from selfattn_core.porting.dialects.catalogue import dialect, dialect_names

REFUSED = {name for name in dialect_names() if dialect(name).refused}
FRAMEWORKS = ("torch", "tensorflow", "jax", "keras", "flax", "matplotlib", "h5py", "ml_dtypes")


def offered(line: str) -> list[tuple[str, str]]:
    """(type, value) of what is offered for the last word, which is empty after a space."""
    *before, incomplete = line.split(" ")
    found = ShellComplete(main, {}, "selfattn", "_SELFATTN_COMPLETE").get_completions(before, incomplete)
    return [(item.type, item.value) for item in found]


def names(line: str) -> list[str]:
    return [value for kind, value in offered(line) if kind == "plain"]


def test_backends():
    assert names("conform ") == list(KNOWN)
    assert names("conform keras-t") == ["keras-tensorflow", "keras-torch"]
    assert names("conform torch keras-jax ") == [name for name in KNOWN if name not in ("torch", "keras-jax")]
    assert names("conform my_package.mine:") == []


def test_cases():
    assert names("conform torch --case SA-TRN-00")[:2] == ["SA-TRN-001", "SA-TRN-002"]
    assert names("conform torch --case SA-TRN-001/") == ["SA-TRN-001/float32", "SA-TRN-001/float64"]
    assert names("conform --case SA-TRN-001/float64/") == ["SA-TRN-001/float64/channels_last"]
    assert names("conform --case TRN") == []


def test_dialects():
    assert REFUSED
    assert names("dialects ") == dialect_names()
    portable = [name for name in dialect_names() if name not in REFUSED]
    assert names("port a.pth b.pth --from ") == names("port a.pth b.pth --to ") == portable
    assert names("port a.pth b.pth --to biggan-") == ["biggan-hf", "biggan-tfhub", "biggan-v1"]


@pytest.mark.parametrize("line", ["port a.pth b.pth --from my", "port a.pth b.pth --to my", "dialects my"])
def test_a_dialect_may_be_a_file(line):
    # Bash drops what comes before the file, and offers files where no name comes after it.
    assert offered(line) == [("file", "my")]
    assert offered(line.removesuffix("my") + "fastai")[0] == ("file", "fastai")


def parameters() -> list[tuple[str, click.Parameter]]:
    return [
        (name, parameter)
        for name in main.list_commands(click.Context(main))
        for parameter in main.get_command(click.Context(main), name).params
    ]


def takes_a_file(parameter: click.Parameter) -> bool:
    return isinstance(parameter.type, click.Path) or "FILE" in (parameter.metavar or "")


TAKING = [(name, parameter) for name, parameter in parameters() if takes_a_file(parameter)]


@pytest.mark.parametrize(
    ("name", "parameter"), TAKING, ids=[f"{name} {parameter.opts[0]}" for name, parameter in TAKING]
)
def test_where_a_file_may_stand_files_are_offered(name, parameter):
    with main.get_command(click.Context(main), name).make_context(
        name, [], resilient_parsing=True
    ) as context:
        kinds = [item.type for item in parameter.shell_complete(context, "repo")]
    assert kinds[:1] == ["file"]


def test_files_may_stand_in_many_places():
    assert len(TAKING) >= 17


@pytest.fixture
def folder(tmp_path):
    """A folder with the command as the shell finds it."""
    command = tmp_path / "selfattn"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m selfattn_core "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "reply"),
    [
        ("selfattn conform keras-t", "keras-tensorflow keras-torch"),
        ("selfattn port a.pth b.pth --from biggan-", "biggan-hf biggan-tfhub biggan-v1"),
        ("selfattn port a.pth b.pth --from my", "files"),
        ("selfattn conform --json rep", "files"),
        ("selfattn inspect rep", "files"),
    ],
)
def test_bash(folder, words, reply):
    script = f"""
        eval "$(_SELFATTN_COMPLETE=bash_source selfattn)"
        compopt() {{ [ "$1 $2" = "-o default" ] && files=yes; }}
        COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        _selfattn_completion selfattn
        [ ${{#COMPREPLY[@]}} = 0 ] && [ "$files" ] && COMPREPLY=(files)
        echo "${{COMPREPLY[*]}}"
    """
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        env=os.environ | {"PATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout.strip(), done.stderr) == (reply, "")


@pytest.mark.parametrize(
    "words", ["selfattn --help", "selfattn conform keras", "selfattn port a b --from big"]
)
def test_no_framework_is_imported(words):
    script = f"""
import sys
from selfattn_core.cli import main
try:
    main({words.split()[1:]!r}, prog_name="selfattn")
except SystemExit:
    pass
print(*sorted(set({FRAMEWORKS!r}) & set(sys.modules)), file=sys.stderr)
"""
    environment = {
        "_SELFATTN_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | ({} if words.endswith("--help") else environment),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout
    assert done.stderr.strip() == ""
