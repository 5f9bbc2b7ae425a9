"""What ends a command outside of it: a sentence, an exit code and no traceback; a fault of the program keeps its own."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from selfattn_core import cli
from selfattn_core.cli.guard import GuardedGroup, ended_by_signals
from selfattn_core.installed import NotInstalledError
from selfattn_core.porting import PortError
from tests.files.writers import make_inputs


def run(error: BaseException):
    group = GuardedGroup("example")

    @group.command()
    def work() -> None:
        raise error

    return CliRunner().invoke(group, ["work"])


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (PortError("x.pth: is empty."), 2, "x.pth: is empty."),
        (FileNotFoundError("x.pth: no such file."), 2, "x.pth: no such file."),
        (PermissionError(errno.EACCES, "Permission denied", "x.pth"), 2, "x.pth: Permission denied."),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "standard output, or a file in"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe", "/dev/fd/63"), 2, "/dev/fd/63: Broken pipe."),
        (MemoryError(), 2, "there is not enough memory. Nothing was written."),
        (MemoryError("1 TiB"), 2, "not enough memory: 1 TiB"),
        (RecursionError(), 2, "nested too deeply"),
        (NotInstalledError("x needs y: pip install 'selfattn[torch]'"), 3, "pip install 'selfattn[torch]'"),
        (
            ImportError("libtorch.so: no such file", name="torch"),
            3,
            "torch is installed, but cannot be loaded",
        ),
        (click.UsageError("expected y,x."), 2, "expected y,x."),
    ],
)
def test_a_sentence_and_an_exit_code(error, code, words):
    result = run(error)
    assert result.exit_code == code
    assert words in result.stderr
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    "error", [ZeroDivisionError(), ValueError("a fault"), ModuleNotFoundError("no module named 'oops'")]
)
def test_a_fault_of_the_program_keeps_its_traceback(error):
    assert run(error).exception is error


def test_a_reader_of_the_output_that_went_away_is_no_error_to_tell():
    result = run(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert (result.exit_code, result.output) == (1, "")


def test_every_command_is_guarded():
    assert isinstance(cli.main, GuardedGroup)
    context = click.Context(cli.main)
    commands = {name: cli.main.get_command(context, name) for name in cli.main.list_commands(context)}
    assert commands
    assert not [name for name, command in commands.items() if isinstance(command, click.Group)]


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_end_it_and_are_given_back(self, number):
        theirs = []
        before = signal.signal(number, lambda *_: theirs.append(1))
        try:
            with pytest.raises(SystemExit, match=str(128 + number)), ended_by_signals():
                signal.raise_signal(number)
            assert theirs == []
            signal.raise_signal(number)
            assert theirs == [1]
        finally:
            signal.signal(number, before)

    def test_one_that_is_ignored_stays_so(self):
        """As `nohup` asks for."""
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with ended_by_signals():
                signal.raise_signal(signal.SIGHUP)
        finally:
            signal.signal(signal.SIGHUP, before)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_one_that_python_would_lose_comes_again(self, number):
        def work() -> None:
            with ended_by_signals():
                left = Left()
                del left
                signal.sigtimedwait([], 10)

        class Left:
            def __del__(self) -> None:
                signal.raise_signal(number)

        # Under `nohup`, SIGHUP is ignored, and stays so.
        before = signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        )
        expected = KeyboardInterrupt if number == signal.SIGINT else SystemExit
        try:
            with pytest.raises(expected):
                work()
        finally:
            signal.signal(number, before)

    def test_other_threads_can_run_a_command(self):
        found = []

        def body() -> None:
            with ended_by_signals():
                found.append(signal.getsignal(signal.SIGTERM))

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        assert found == [signal.getsignal(signal.SIGTERM)]

    def test_another_loss_is_told_as_ever(self, monkeypatch):
        told = []
        monkeypatch.setattr(sys, "unraisablehook", told.append)

        class Left:
            def __del__(self) -> None:
                raise ArithmeticError

        with ended_by_signals():
            left = Left()
            del left
        assert [lost.exc_type for lost in told] == [ArithmeticError]


COMMAND = [sys.executable, "-c", "from selfattn_core.cli import main; main(prog_name='selfattn')"]


def command(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_full_standard_output(tmp_path):
    make_inputs(tmp_path)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, "inspect", "layer.safetensors"],
            cwd=tmp_path,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 2
    assert done.stderr.startswith("Error: standard output")
    assert "Traceback" not in done.stderr


def test_a_library_that_does_not_load(tmp_path):
    """A torch whose shared library is missing raises what the loader says, an OSError."""
    make_inputs(tmp_path)
    package = tmp_path / "broken" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import ctypes\nctypes.CDLL('libabsent-selfattn.so')\n")
    done = command(
        *("port", "layer.safetensors", "o.pt", "--to", "fgh"),
        cwd=tmp_path,
        PYTHONPATH=str(tmp_path / "broken"),
    )
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("Error: torch is installed, but cannot be loaded: libabsent-selfattn.so")
    assert not (tmp_path / "o.pt").exists()


def test_a_place_for_temporary_files_that_is_full(tmp_path, monkeypatch):
    """The message is about that place, and the target is not touched."""
    make_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = CliRunner().invoke(cli.main, ["port", "layer.safetensors", "o.npz", "--to", "fgh"])
    assert done.exit_code == 2
    assert f"{folder}: what is ported is first written there to be checked" in done.output
    assert "Set TMPDIR" in done.output
    assert not (tmp_path / "o.npz").exists()
