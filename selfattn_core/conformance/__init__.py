"""The conformance kit. Each backend answers the cases in its own process, and the kit compares them with the definition."""

from typing import TYPE_CHECKING, Any

from selfattn_core.conformance.backends import REGISTRY, resolve
from selfattn_core.conformance.protocol import ABILITIES, Backend
from selfattn_core.conformance.questions.peak_memory import PeakUnknownError

if TYPE_CHECKING:
    from selfattn_core.conformance.reproduce import run_case

__all__ = ["ABILITIES", "REGISTRY", "Backend", "PeakUnknownError", "resolve", "run_case"]


def __getattr__(name: str) -> Any:
    # `run_case` imports the whole kit. Most importers of this package need only the protocol.
    if name == "run_case":
        from selfattn_core.conformance.reproduce import run_case

        return run_case
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
