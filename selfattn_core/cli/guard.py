"""Error handling of all commands: a user's mistake gives one paragraph and an exit code, and a signal leaves no files."""

import errno
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from selfattn_core.cli.exit_codes import BAD_INPUT, MISSING
from selfattn_core.installed import NotInstalledError
from selfattn_core.problems import ProblemError

__all__ = ["GuardedGroup", "ended_by_signals", "explained", "in_words_of_the_command"]


class GuardedGroup(click.Group):
    r"""A group whose commands end without a traceback if the cause is outside the program.

    Example:
        >>> from click.testing import CliRunner
        >>> group = GuardedGroup("example")
        >>> @group.command()
        ... def read() -> None:
        ...     raise FileNotFoundError(errno.ENOENT, "No such file or directory", "layer.pth")
        >>> result = CliRunner().invoke(group, ["read"])
        >>> result.exit_code, result.stderr
        (2, 'Error: layer.pth: No such file or directory.\n')
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command and translate its errors."""
        with ended_by_signals():
            try:
                return super().invoke(ctx)
            except Exception as error:
                failure = explained(error)
                if failure is None:
                    raise
                raise failure from error


class _Failure(click.ClickException):
    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc]


def explained(error: Exception) -> click.ClickException | None:
    """The message and exit code for an exception. None for click's own, and for a bug, whose traceback is needed.

    Args:
        error: the exception that ended a command.

    Example:
        >>> explained(MemoryError()).exit_code
        2
        >>> explained(ZeroDivisionError()) is None
        True
    """
    message, code = "", BAD_INPUT
    if isinstance(error, ImportError):
        message, code = _of_a_library(error), MISSING
    elif isinstance(error, ProblemError):
        message = error.in_command()
    elif isinstance(error, OSError):
        message = _of_the_system(error)
    elif isinstance(error, MemoryError):
        message = f"there is not enough memory{f': {error}' if str(error) else ''}. Nothing was written."
    elif isinstance(error, RecursionError):
        message = "the input is nested too deeply. Nothing was written."
    return _Failure(message, code) if message else None


def in_words_of_the_command(error: Exception) -> str:
    """The message of an exception, with options as the command has them."""
    return error.in_command() if isinstance(error, ProblemError) else str(error)


def _of_a_library(error: ImportError) -> str:
    if isinstance(error, ModuleNotFoundError):
        # Our own message names the package to install. Any other missing module is a bug.
        return str(error) if isinstance(error, NotInstalledError) else ""
    return f"{error.name or 'a library'} is installed, but cannot be loaded: {error}"


def _of_the_system(error: OSError) -> str:
    if error.errno is None:
        return str(error)
    if error.filename is None:
        # It is not an error if a reader of standard output ends early, as `head` does. click then exits quietly.
        if error.errno == errno.EPIPE:
            return ""
        return f"standard output, or a file in {tempfile.tempdir or 'the folder of temporary files'}: {error.strerror or error}."
    return f"{error.filename}: {error.strerror or error}."


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into exceptions, like Ctrl-C, so that processes are ended and unfinished files removed.

    A signal that is ignored, for example by `nohup`, stays ignored. In a callback, Python prints the exception and
    continues. The signal is then sent again.
    """
    told = False

    def leave(number: int, _: object) -> None:
        nonlocal told
        if not told:
            told = True
            # Not through the stream, which the signal may have interrupted while it wrote.
            with suppress(OSError):
                os.write(2, _ENDED.format(signal.Signals(number).name).encode())
        raise SystemExit(128 + number)

    # Only the main thread can set a handler.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM] if sys.platform == "win32" else [signal.SIGTERM, signal.SIGHUP]
    before = {number: signal.getsignal(number) for number in numbers}
    theirs = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in theirs:
        signal.signal(number, leave)
    unraisable = sys.unraisablehook

    def again(lost: "sys.UnraisableHookArgs") -> None:
        if not isinstance(lost.exc_value, KeyboardInterrupt | SystemExit):
            unraisable(lost)
            return
        code = lost.exc_value.code if isinstance(lost.exc_value, SystemExit) else None
        number = code - 128 if isinstance(code, int) else signal.SIGINT
        # Sent from another thread a moment later, when this callback is over.
        threading.Timer(_MOMENT, os.kill, (os.getpid(), number)).start()

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = unraisable
        for number, handler in theirs.items():
            signal.signal(number, handler or signal.SIG_DFL)


_ENDED = (
    "Error: {} ended this command, before it was finished. If you did not send it, look for the process that did: "
    "it may be one that this command started, such as a backend that ends its parent.\n"
)

_MOMENT = 0.01
