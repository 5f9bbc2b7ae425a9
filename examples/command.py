"""Code that the example programs share: exit codes, a type for counts, and an interrupt without a traceback."""

import argparse
import sys
from collections.abc import Callable

from selfattn_core.cli.exit_codes import BAD_INPUT, MISSING
from selfattn_core.cli.exit_codes import CHECK_FAILED as FAILED

__all__ = ["BAD_INPUT", "FAILED", "INTERRUPTED", "MISSING", "positive", "run"]

INTERRUPTED = 130


def positive(text: str) -> int:
    """An option's value as a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number of at least 1")
    return int(text)


def run(main: Callable[[], int]) -> None:
    """End the process with the exit code that `main` returns."""
    try:
        code = main()
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)
