"""Exit codes of the `selfattn` command; 0 is all well."""

__all__ = ["BAD_INPUT", "CHECK_FAILED", "MISSING"]

CHECK_FAILED = 1
BAD_INPUT = 2
"""Wrong usage, or an input that cannot be used; the same as click's own."""
MISSING = 3
"""Something that is needed is not installed."""
