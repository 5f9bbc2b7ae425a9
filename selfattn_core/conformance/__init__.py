"""The conformance kit: cases as data, each run by a backend in its own process and compared with the numpy spec."""

from typing import TYPE_CHECKING, Any

from selfattn_core.conformance.backends import REGISTRY, resolve
from selfattn_core.conformance.protocol import ABILITIES, Backend

if TYPE_CHECKING:
    from selfattn_core.conformance.reproduce import run_case

__all__ = ["ABILITIES", "REGISTRY", "Backend", "resolve", "run_case"]


def __getattr__(name: str) -> Any:
    # It imports the whole kit, and most who import this package need only the protocol.
    if name == "run_case":
        from selfattn_core.conformance.reproduce import run_case

        return run_case
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
