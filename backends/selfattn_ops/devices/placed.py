"""What a backend of the kit remembers of the device that it is on; no framework here."""

from collections.abc import Iterable

__all__ = ["OnDevice"]


class OnDevice:
    """The device that is computed on, and where answers lay.

    Example:
        >>> backend = OnDevice()
        >>> backend.note(["cuda:0"])
        >>> sorted(backend.places()), sorted(backend.places())
        (['cuda:0'], [])
    """

    device = "cpu:0"
    _noted: frozenset[str] = frozenset()

    def places(self) -> frozenset[str]:
        """Where the answers since the last call lay."""
        noted, self._noted = self._noted, frozenset()
        return noted

    def note(self, names: Iterable[str]) -> None:
        """Remember where an answer lies.

        Args:
            names: of its devices.
        """
        self._noted |= set(names)
