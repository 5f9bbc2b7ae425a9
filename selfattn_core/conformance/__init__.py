"""The conformance kit: cases as data, each run by a backend in its own process and compared with the numpy spec."""

from selfattn_core.conformance.backend import REGISTRY, Backend, resolve

__all__ = ["REGISTRY", "Backend", "resolve"]
