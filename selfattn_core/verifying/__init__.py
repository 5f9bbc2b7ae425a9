"""Verification of exported files: the comparison of a file's outputs with the definition at its weights."""

from selfattn_core.verifying.errors import VerifyError
from selfattn_core.verifying.report import Finding, VerifyReport
from selfattn_core.verifying.verify import verify

__all__ = ["Finding", "VerifyError", "VerifyReport", "verify"]
