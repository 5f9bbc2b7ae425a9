"""What porting says when it cannot go on."""

from selfattn_core.porting.report import PortReport

__all__ = ["PortError", "VerificationError"]


class PortError(ValueError):
    """A file, a dialect or a target that cannot be used: what was received, what was expected and what to do.

    The command turns it into one paragraph and exit code 2. Nothing has been executed or written when it is raised.

    Example:
        >>> raise PortError("layer.pth: is empty; expected a checkpoint.")
        Traceback (most recent call last):
        ...
        selfattn_core.porting.errors.PortError: layer.pth: is empty; expected a checkpoint.
    """


class VerificationError(PortError):
    """A port whose verification failed; nothing has been written. The command prints the report and exits with 1.

    Args:
        report: all of the port, the failed checks among it.
    """

    def __init__(self, report: PortReport) -> None:
        failed = "; ".join(
            f"{check.name}: {check.detail}" for check in report.checks if check.outcome == "failed"
        )
        super().__init__(f"{report.target}: nothing was written, because a check failed: {failed}.")
        self.report = report
