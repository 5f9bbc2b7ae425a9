"""The former home of `PeakUnknownError`, which backends imported from here. Use `selfattn_core.conformance`."""

import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "PeakUnknownError":
        from selfattn_core.conformance.questions.peak_memory import PeakUnknownError

        warnings.warn(
            "selfattn_core.conformance.memory has moved: import PeakUnknownError from selfattn_core.conformance.",
            DeprecationWarning,
            stacklevel=2,
        )
        return PeakUnknownError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
