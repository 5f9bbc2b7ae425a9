"""The error about wrong arguments of `verify`. Wrong answers of an artifact are part of the report instead."""

__all__ = ["VerifyError"]


class VerifyError(ValueError):
    """The artifact, the weights or the options cannot be used, or do not belong together."""
