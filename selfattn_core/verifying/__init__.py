"""Verification of exported files: does a file that runs elsewhere still compute the function of these weights?"""

from selfattn_core.verifying.errors import VerifyError
from selfattn_core.verifying.report import Finding, VerifyReport
from selfattn_core.verifying.verify import verify

__all__ = ["Finding", "VerifyError", "VerifyReport", "verify"]
