"""Probes for hypothesis."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from selfattn_core.conformance.protocol import Claims
from selfattn_core.conformance.search.drawing import drawn
from selfattn_core.conformance.search.probe import Probe
from selfattn_core.installed import require

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

__all__ = ["probes"]


def probes(claims: Claims, *, small: bool = False) -> "SearchStrategy[Probe]":
    """The probes within the claims of a backend.

    Every choice is drawn as bits. For wider draws hypothesis also takes constants from the source files of whoever runs it,
    and a search would not be the same on another machine.

    Args:
        claims: the claims of the backend.
        small: as for `drawn`.

    Raises:
        NotInstalledError: if hypothesis is not installed.

    If a signal ends the program while a probe is drawn, the strategy raises KeyboardInterrupt from its SystemExit.
    """
    require("selfattn conform --explore", ["hypothesis"], "search")
    from hypothesis import strategies as st

    bit = st.booleans()

    @st.composite
    def probe(draw: "DrawFn") -> Probe:
        def choose(choices: Sequence[Any]) -> Any:
            # Three bits more than needed, so that no choice comes twice as often as another.
            width = (len(choices) - 1).bit_length() + (3 if len(choices) & (len(choices) - 1) else 0)
            number = 0
            for _ in range(width):
                number = 2 * number + draw(bit)
            return choices[(number * len(choices)) >> width]

        try:
            return drawn(choose, claims, small=small)
        except SystemExit as error:
            # Hypothesis would take it for a failure of the probe, and draw the probe again.
            raise KeyboardInterrupt from error

    return probe()
