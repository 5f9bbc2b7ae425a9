"""The errors of porting."""

import os

from selfattn_core.porting.report import PortReport
from selfattn_core.problems import ProblemError, Remedy

__all__ = ["PortError", "VerificationError", "target_exists"]


class PortError(ProblemError):
    """A file, a dialect or a target that cannot be used. The message gives what was received, what was expected and what to do.

    `problems` lists the reasons as data: the kind of each, the names that it is about, and the options that solve it. The
    command turns the error into one paragraph and exit code 2. Nothing was executed or written before the error.

    Example:
        >>> raise PortError("layer.pth: is empty. Expected a checkpoint.")
        Traceback (most recent call last):
        ...
        selfattn_core.porting.errors.PortError: layer.pth: is empty. Expected a checkpoint.
    """

    def within(self, where: str, after: str = "") -> "PortError":
        """The same problems, with their place before the message and more text after it."""
        parts = (self.text,) if isinstance(self.text, str) else self.text
        return PortError((where, *parts, after), self.problems)


class VerificationError(PortError):
    """A port whose verification failed. Nothing was written. The command prints the report and exits with 1.

    Args:
        report: the report of the whole port, with the failed checks.
    """

    def __init__(self, report: PortReport) -> None:
        failed = [check for check in report.checks if check.outcome == "failed"]
        reasons = "; ".join(f"{check.name}: {check.detail}" for check in failed)
        super().__init__(
            f"{report.target}: nothing was written, because a check failed: {reasons}.",
            kind="check_failed",
            names=[check.name for check in failed],
        )
        self.report = report


def target_exists(target: str | os.PathLike[str]) -> PortError:
    """The error for a target that exists and may not be replaced."""
    return PortError(
        (
            f"{target}: exists already and was left as it is. To replace it, pass ",
            Remedy("overwrite", value=True),
            ".",
        ),
        kind="target_exists",
    )
