"""The conformance kit: cases as data, each run by a backend in its own process and compared with the numpy spec."""

from selfattn_core.conformance.protocol import ABILITIES, REGISTRY, Backend, resolve

__all__ = ["ABILITIES", "REGISTRY", "Backend", "resolve"]
