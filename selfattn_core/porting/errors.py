"""What porting says when it cannot go on."""

__all__ = ["PortError"]


class PortError(ValueError):
    """A file, a dialect or a target that cannot be used: what was received, what was expected and what to do.

    The command turns it into one paragraph and exit code 2. Nothing has been executed or written when it is raised.

    Example:
        >>> raise PortError("layer.pth: is empty; expected a checkpoint.")
        Traceback (most recent call last):
        ...
        selfattn_core.porting.errors.PortError: layer.pth: is empty; expected a checkpoint.
    """
