"""The conformance kit: cases as data, each run by a backend in its own process and compared with the numpy spec."""

from selfattn_core.conformance.backends import REGISTRY, resolve
from selfattn_core.conformance.protocol import ABILITIES, Backend

__all__ = ["ABILITIES", "REGISTRY", "Backend", "resolve"]
