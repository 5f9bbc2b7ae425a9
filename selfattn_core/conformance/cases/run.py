"""A run: one case in one dtype and layout."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from selfattn_core.conformance.cases.families import FAMILIES, Level, through
from selfattn_core.conformance.cases.table import CASES, Case

__all__ = ["LAYOUTS", "Run", "all_runs", "chosen_layout", "is_claimed"]

LAYOUTS = ("channels_last", "channels_first")


@dataclass(frozen=True)
class Run:
    """One case in one dtype and layout."""

    case: Case
    dtype: str
    layout: str

    @property
    def id(self) -> str:
        """As in "SA-FWD-001/float32/channels_last"."""
        return f"{self.case.id}/{self.dtype}/{self.layout}"

    def is_named(self, key: str) -> bool:
        """Whether a key of `Backend.expected_failures` means this run.

        Example:
            >>> run = all_runs()[0]
            >>> run.id, run.is_named("SA-FWD-001/float32"), run.is_named("SA-FWD-001/float64")
            ('SA-FWD-001/float32/channels_last', True, False)
        """
        return f"{self.id}/".startswith(f"{key}/")


def all_runs(cases: Iterable[Case] = CASES, *, level: Level = "deploy") -> list[Run]:
    """The cases up to a level, in each of their dtypes and layouts.

    Args:
        cases: from which to choose.
        level: the highest.

    Example:
        >>> len(all_runs()) > len(all_runs(level="core")) > 100
        True
    """
    families = through(level)
    return [
        Run(case, dtype, layout)
        for case in cases
        if case.family in families
        for dtype in case.dtypes
        for layout in LAYOUTS
        if layout == LAYOUTS[0] or _layout_matters(case, dtype)
    ]


def is_claimed(run: Run, claims: Collection[str], layouts: Collection[str], dtypes: Collection[str]) -> bool:
    """Whether a backend that claims these has to answer a run."""
    has_layout = run.layout in layouts or not _layout_matters(run.case, run.dtype)
    return run.case.needs <= set(claims) and has_layout and run.dtype in dtypes


def chosen_layout(run: Run, layouts: Collection[str]) -> str:
    """The layout to compute a claimed run in: its own, or where that is of no importance, one that there is."""
    return run.layout if run.layout in layouts else next(iter(layouts))


def _layout_matters(case: Case, dtype: str) -> bool:
    # In other dtypes than float32, a second layout shows nothing more.
    return dtype == "float32" and FAMILIES[case.family].every_layout
