"""What is wrong with what was given to `verify`; not with what the artifact computes."""

__all__ = ["VerifyError"]


class VerifyError(ValueError):
    """The artifact, the weights or the options cannot be used, or do not belong together."""
