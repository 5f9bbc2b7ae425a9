"""The device of a backend of the kit and of its answers, without a framework."""

from collections.abc import Iterable

__all__ = ["OnDevice"]


class OnDevice:
    """The device that computes, and the devices of the answers.

    Example:
        >>> backend = OnDevice()
        >>> backend.note(["cuda:0"])
        >>> sorted(backend.places()), sorted(backend.places())
        (['cuda:0'], [])
    """

    device = "cpu:0"
    _noted: frozenset[str] = frozenset()

    def places(self) -> frozenset[str]:
        """The devices of all answers since the last call of this method."""
        noted, self._noted = self._noted, frozenset()
        return noted

    def note(self, names: Iterable[str]) -> None:
        """Remember the devices of an answer.

        Args:
            names: names of the devices.
        """
        self._noted |= set(names)
