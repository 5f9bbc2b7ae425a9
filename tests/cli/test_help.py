"""`selfattn --help`: whole sentences at 80 columns, and quickly."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from selfattn_core import __version__, cli
from selfattn_core.cli import main
from selfattn_core.cli.command import COMMANDS


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def help_of(*words: str) -> str:
    done = CliRunner().invoke(main, [*words, "--help"], prog_name="selfattn")
    assert done.exit_code == 0
    return done.output


def summary(name: str) -> str:
    """The first paragraph of a command's help."""
    return " ".join(help_of(name).split("\n\n")[1].split())


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_holds_whole_sentences(name):
    assert f"\n  {name:<8}  {summary(name)}\n" in help_of()
    assert summary(name).endswith(".")


@pytest.mark.parametrize("name", COMMANDS)
def test_so_does_the_list_that_a_shell_shows(name):
    offered = ShellComplete(main, {}, "selfattn", "_SELFATTN_COMPLETE").get_completions([], name)
    assert [(item.value, item.help) for item in offered] == [(name, summary(name))]


def test_a_sentence_that_is_too_long_is_noticed(monkeypatch):
    command = main.get_command(click.Context(main), "port")
    monkeypatch.setattr(command, "help", f"Move {'very ' * 20}many weights.")
    assert summary("port") not in help_of()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained_within_the_line(name):
    text = help_of(name).replace("[BACKEND]...", "[BACKEND]")
    assert max(map(len, text.splitlines())) <= 80
    assert "..." not in text
    assert "…" not in text
    options = main.get_command(click.Context(main), name).params
    assert all(option.help for option in options if isinstance(option, click.Option))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_hides_no_module(name):
    __import__(f"selfattn_core.cli.{name}")
    assert isinstance(getattr(cli, name), ModuleType)


def test_every_command_is_listed():
    """A file that defines a command and is not in `COMMANDS` would never be found."""
    files = Path(cli.__file__).parent.glob("*.py")
    defining = {path.stem for path in files if "@click.command()" in path.read_text(encoding="utf-8")}
    assert defining == set(COMMANDS)


def test_help_reads_no_room_of_the_library():
    """Half a second, most of it numpy's: what a command needs is read when it runs."""
    script = """
import sys
from selfattn_core.cli import main
try:
    main(["--help"])
except SystemExit:
    rooms = {"conformance", "porting", "verifying", "viz"}
    print(*sorted(rooms & {name.split(".")[1] for name in sys.modules if name.startswith("selfattn_core.")}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""


def test_version():
    done = CliRunner().invoke(main, ["--version"], prog_name="selfattn")
    assert done.output == f"selfattn, version {__version__}\n"
