"""The conformance cases as pytest items, for the test run of somebody else's backend.

    pytest -p selfattn_core.conformance.pytest_plugin --selfattn-backend my_package.mine:Backend

adds one item for each case in each dtype and layout to whatever else is collected; to run nothing else, name a folder
without tests, or this package: `--pyargs selfattn_core.conformance`. `-k` and `--deselect` choose among the items, and
only the chosen ones are computed, in one process for each backend. What a backend does not claim is skipped and says so;
one that claims nothing of its level, or declines all that it claims, fails.

The plugin is named on the command line, and is no entry point: installing selfattn changes nobody's test runs.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import pytest

from selfattn_core.conformance.backends import REGISTRY, is_target
from selfattn_core.conformance.cases.case import Run
from selfattn_core.conformance.cases.families import LEVELS
from selfattn_core.conformance.cases.table import all_runs
from selfattn_core.conformance.execution.runner import run_backend, unknown_device
from selfattn_core.conformance.report.summary import command_line
from selfattn_core.conformance.results import BackendReport, Outcome

__all__ = [
    "BackendCollector",
    "CaseItem",
    "pytest_addoption",
    "pytest_collection_modifyitems",
    "pytest_report_header",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Four options, all of which begin with `--selfattn`."""
    group = parser.getgroup("selfattn", "conformance of 2-D self-attention layers")
    group.addoption(
        "--selfattn-backend",
        action="append",
        default=[],
        metavar="MODULE:OBJECT",
        help="a backend to check, or the name of one that ships with selfattn; may be repeated",
    )
    group.addoption(
        "--selfattn-level",
        choices=list(LEVELS),
        default="deploy",
        help="how far to go; by default everything",
    )
    group.addoption(
        "--selfattn-device",
        action="append",
        default=[],
        metavar="DEVICE",
        help="to compute on, in the words of the framework; by default the CPU",
    )
    group.addoption("--selfattn-seed", type=_seed, default=0, metavar="S", help="of the random inputs")


def _seed(words: str) -> int:
    if not words.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"got {words!r}, expected a whole number that is not negative")
    return int(words)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Which backends are checked."""
    names = config.getoption("selfattn_backend")
    if not names:
        return []
    level, seed = config.getoption("selfattn_level"), config.getoption("selfattn_seed")
    device = " and ".join(config.getoption("selfattn_device"))
    return [f"selfattn: {', '.join(names)} at level {level}, seed {seed}{f', on {device}' if device else ''}"]


# First, so that -k and --deselect of pytest itself see the items.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Add the items of each backend."""
    names = list(dict.fromkeys(config.getoption("selfattn_backend")))
    if unknown := [name for name in names if name not in REGISTRY and not is_target(name)]:
        raise pytest.UsageError(
            f"--selfattn-backend {', '.join(unknown)}: expected module:object, for example "
            f"my_package.mine:Backend, or one of {', '.join(REGISTRY)}."
        )
    devices = config.getoption("selfattn_device")
    if len(devices) > 1:
        raise pytest.UsageError(f"--selfattn-device: got {' and '.join(devices)}; expected one device a run.")
    device = devices[0] if devices else None
    if wrong := [f"{name}: {problem}" for name in names if (problem := unknown_device(name, device))]:
        raise pytest.UsageError(f"--selfattn-device: {'; '.join(wrong)}.")
    runs = all_runs(level=config.getoption("selfattn_level"))
    for name in names:
        collector = BackendCollector.from_parent(session, name=name, nodeid=name, runs=runs)
        items.extend(CaseItem.from_parent(collector, name=run.id, run=run) for run in runs)


class BackendCollector(pytest.Collector):
    """The items of one backend, and their one report."""

    _outcomes: dict[Run, Outcome] | None = None
    _report: BackendReport | None = None

    def __init__(self, *, runs: Sequence[Run], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.runs = runs

    def collect(self) -> Iterator[pytest.Item]:
        """Nothing: the items are made where the options are known."""
        return iter(())

    def outcome(self, run: Run) -> tuple[BackendReport, Outcome | None]:
        """The report of this backend, made when the first item asks, and what came of a run."""
        if self._report is None or self._outcomes is None:
            chosen = [
                item.run for item in self.session.items if isinstance(item, CaseItem) and item.parent is self
            ]
            devices = self.config.getoption("selfattn_device")
            self._report = run_backend(
                self.name,
                seed=self.config.getoption("selfattn_seed"),
                runs=chosen,
                device=devices[0] if devices else "",
            )
            # The run of an outcome may be in another layout than was asked, where that is of no importance.
            self._outcomes = dict(zip(chosen, self._report.outcomes, strict=False))
        return self._report, self._outcomes.get(run)

    @cached_property
    def answers_nothing(self) -> bool:
        """Whether no chosen run was answered, once there is a report, and none that was left out might have been."""
        report, outcomes = self._report, self._outcomes or {}
        if report is None or any(outcome.status != "unclaimed" for outcome in outcomes.values()):
            return False
        return not any(report.claimed.covers(run) for run in self.runs if run not in outcomes)


class NotConformantError(Exception):
    """Carries the verdict of a case to the report of its failure, and the command that repeats it."""

    def __init__(self, words: str, command: str = "") -> None:
        super().__init__(words)
        self.command = command


class CaseItem(pytest.Item):
    """One case in one dtype and layout."""

    def __init__(self, *, run: Run, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.run = run

    def runtest(self) -> None:
        """Pass, fail, skip or fail as expected, as the kit says."""
        assert isinstance(self.parent, BackendCollector)  # noqa: S101 - for the type
        report, outcome = self.parent.outcome(self.run)
        if report.missing:
            raise NotConformantError(f"{', '.join(report.missing)} not installed")
        if outcome is None:
            raise NotConformantError(f"did not start: {report.error}")
        if outcome.status == "unclaimed":
            words = f"unclaimed{f': {outcome.message}' if outcome.message else ''}"
            if self.parent.answers_nothing:
                level = self.config.getoption("selfattn_level")
                raise NotConformantError(f"{words}, as is everything else that is asked at level {level}")
            pytest.skip(words)
        if outcome.status == "expected-failure":
            pytest.xfail(f"{outcome.reason} ({outcome.link})")
        if outcome.status != "pass":
            seed, devices = self.config.getoption("selfattn_seed"), self.config.getoption("selfattn_device")
            again = command_line(self.parent.name, outcome.run.id, seed=seed, device="".join(devices))
            raise NotConformantError(f"{outcome.status}: {outcome.message}", again)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The verdict; a traceback through the kit would tell nothing about the backend."""
        if isinstance(excinfo.value, NotConformantError):
            case = self.run.case
            heading = f"{case.title} ({case.family}; {case.config}, input {case.shape})"
            return "\n".join(part for part in (heading, str(excinfo.value), excinfo.value.command) if part)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[str, None, str]:
        """The heading of a failure."""
        assert self.parent is not None  # noqa: S101 - for the type
        return self.parent.name, None, f"{self.parent.name} {self.run.id}"
