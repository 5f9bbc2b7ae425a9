"""Exit codes of the `selfattn` command. 0 is success."""

__all__ = ["BAD_INPUT", "CHECK_FAILED", "MISSING"]

CHECK_FAILED = 1
BAD_INPUT = 2
"""Wrong usage, or an input that cannot be used. click uses the same code."""
MISSING = 3
"""A required package or device is missing."""
