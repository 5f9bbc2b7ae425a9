"""A pytest plugin that adds the conformance runs of a backend as test items.

    pytest -p selfattn_core.conformance.pytest_plugin --selfattn-backend my_package.mine:Backend

adds one item for each case in each dtype and layout to the collected tests. To run nothing else, name a folder without
tests, or this package: `--pyargs selfattn_core.conformance`. `-k` and `--deselect` select items. Only the selected ones are
computed, all runs of a backend in one process. An unclaimed run is a skipped test with that reason. If a backend claims no
run of the level, or declines all claimed ones, its items fail.

`--selfattn-replay TOKEN` adds an item that repeats what a search found. Each of these starts a process of its own. An
unclaimed token is a skipped test. A token that cannot be judged fails.

The plugin must be named on the command line. It is not an entry point, so installing selfattn changes no other test runs.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import pytest

from selfattn_core.conformance.backends import KNOWN, is_target
from selfattn_core.conformance.cases.case import Run
from selfattn_core.conformance.cases.families import LEVELS
from selfattn_core.conformance.cases.table import all_runs
from selfattn_core.conformance.execution.runner import run_backend, unknown_device
from selfattn_core.conformance.report.summary import command_line, replay_line
from selfattn_core.conformance.results import BackendReport, Outcome
from selfattn_core.conformance.search.run import search_backend
from selfattn_core.conformance.search.token import TokenError, from_token

__all__ = [
    "BackendCollector",
    "CaseItem",
    "ReplayItem",
    "pytest_addoption",
    "pytest_collection_modifyitems",
    "pytest_report_header",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add five options. All begin with `--selfattn`."""
    group = parser.getgroup("selfattn", "conformance of 2-D self-attention layers")
    group.addoption(
        "--selfattn-backend",
        action="append",
        default=[],
        metavar="MODULE:OBJECT",
        help="a backend to check, or the name of a built-in one; repeatable",
    )
    group.addoption(
        "--selfattn-level",
        choices=list(LEVELS),
        default="deploy",
        help="the highest level to check; by default deploy",
    )
    group.addoption(
        "--selfattn-device",
        action="append",
        default=[],
        metavar="DEVICE",
        help="the device to compute on, as the framework names it; by default the CPU",
    )
    group.addoption(
        "--selfattn-seed", type=_seed, default=0, metavar="S", help="the seed of the random inputs"
    )
    group.addoption(
        "--selfattn-replay",
        action="append",
        default=[],
        metavar="TOKEN",
        help="what a search found, to be repeated as a test of its own; repeatable",
    )


def _seed(words: str) -> int:
    if not words.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"got {words!r}, expected a whole number that is not negative")
    return int(words)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """A line with the backends, the level and the seed."""
    names = config.getoption("selfattn_backend")
    if not names:
        return []
    level, seed = config.getoption("selfattn_level"), config.getoption("selfattn_seed")
    device = " and ".join(config.getoption("selfattn_device"))
    return [f"selfattn: {', '.join(names)} at level {level}, seed {seed}{f', on {device}' if device else ''}"]


# This runs first, so that -k and --deselect of pytest apply to the items.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Add the items of each backend."""
    names = list(dict.fromkeys(config.getoption("selfattn_backend")))
    if unknown := [name for name in names if name not in KNOWN and not is_target(name)]:
        raise pytest.UsageError(
            f"--selfattn-backend {', '.join(unknown)}: expected module:object, for example "
            f"my_package.mine:Backend, or one of {', '.join(KNOWN)}."
        )
    devices = config.getoption("selfattn_device")
    if len(devices) > 1:
        raise pytest.UsageError(f"--selfattn-device: got {' and '.join(devices)}; expected one device a run.")
    device = devices[0] if devices else None
    if wrong := [f"{name}: {problem}" for name in names if (problem := unknown_device(name, device))]:
        raise pytest.UsageError(f"--selfattn-device: {'; '.join(wrong)}.")
    tokens = list(dict.fromkeys(config.getoption("selfattn_replay")))
    try:
        for token in tokens:
            from_token(token)
    except TokenError as error:
        raise pytest.UsageError(f"--selfattn-replay: {error}") from error
    runs = all_runs(level=config.getoption("selfattn_level"))
    for name in names:
        collector = BackendCollector.from_parent(session, name=name, nodeid=name, runs=runs)
        items.extend(CaseItem.from_parent(collector, name=run.id, run=run) for run in runs)
        items.extend(ReplayItem.from_parent(collector, name=token, token=token) for token in tokens)


class BackendCollector(pytest.Collector):
    """The items of one backend, and the report that they share."""

    _outcomes: dict[Run, Outcome] | None = None
    _report: BackendReport | None = None

    def __init__(self, *, runs: Sequence[Run], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.runs = runs

    def collect(self) -> Iterator[pytest.Item]:
        """Nothing. `pytest_collection_modifyitems` creates the items, because it knows the options."""
        return iter(())

    def outcome(self, run: Run) -> tuple[BackendReport, Outcome | None]:
        """The report of this backend and the outcome of a run. The first call runs all selected items."""
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
            # An outcome may be in another layout than its item if the layout does not matter.
            self._outcomes = dict(zip(chosen, self._report.outcomes, strict=False))
        return self._report, self._outcomes.get(run)

    @cached_property
    def answers_nothing(self) -> bool:
        """Whether the report contains no answered run, and no claimed run was deselected."""
        report, outcomes = self._report, self._outcomes or {}
        if report is None or any(outcome.status != "unclaimed" for outcome in outcomes.values()):
            return False
        return not any(report.claimed.covers(run) for run in self.runs if run not in outcomes)


class NotConformantError(Exception):
    """A failed run: the verdict, and the command that repeats it."""

    def __init__(self, words: str, command: str = "") -> None:
        super().__init__(words)
        self.command = command


class CaseItem(pytest.Item):
    """One case in one dtype and layout."""

    def __init__(self, *, run: Run, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.run = run

    def runtest(self) -> None:
        """Pass, fail, skip or xfail, according to the outcome of the run."""
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
                raise NotConformantError(f"{words}, as is every other case of level {level}")
            pytest.skip(words)
        if outcome.status == "expected-failure":
            pytest.xfail(f"{outcome.reason} ({outcome.link})")
        if outcome.status != "pass":
            seed, devices = self.config.getoption("selfattn_seed"), self.config.getoption("selfattn_device")
            again = command_line(self.parent.name, outcome.run.id, seed=seed, device="".join(devices))
            raise NotConformantError(f"{outcome.status}: {outcome.message}", again)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The verdict, without a traceback through the kit, which would not help to find the bug."""
        if isinstance(excinfo.value, NotConformantError):
            case = self.run.case
            heading = f"{case.title} ({case.family}; {case.config}, input {case.shape})"
            return "\n".join(part for part in (heading, str(excinfo.value), excinfo.value.command) if part)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[str, None, str]:
        """The location and heading of a failure."""
        assert self.parent is not None  # noqa: S101 - for the type
        return self.parent.name, None, f"{self.parent.name} {self.run.id}"


class ReplayItem(pytest.Item):
    """One token of a search."""

    def __init__(self, *, token: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.token = token

    def runtest(self) -> None:
        """Pass, fail with what the probe shows, or skip if the backend does not claim the probe."""
        assert self.parent is not None  # noqa: S101 - for the type
        devices = self.config.getoption("selfattn_device")
        report = search_backend(self.parent.name, tokens=[self.token], device="".join(devices))
        if report.missing:
            raise NotConformantError(f"{', '.join(report.missing)} not installed")
        if report.search is None:
            raise NotConformantError(f"did not start: {report.error}")
        if report.search.ended == "interrupt":
            raise SystemExit(report.search.exit_code) if report.search.exit_code else KeyboardInterrupt
        for skipped in report.search.skipped:
            words = f"{skipped.why}: {skipped.message}"
            if skipped.why == "unclaimed":
                pytest.skip(words)
            raise NotConformantError(words)
        if report.search.findings:
            words = "\n".join(
                f"{found.status}: {found.property}: {found.message}" for found in report.search.findings
            )
            again = replay_line(self.parent.name, self.token, device="".join(devices))
            raise NotConformantError(words, again)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The verdict, without a traceback through the kit."""
        if isinstance(excinfo.value, NotConformantError):
            heading = from_token(self.token).words
            return "\n".join(part for part in (heading, str(excinfo.value), excinfo.value.command) if part)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[str, None, str]:
        """The location and heading of a failure."""
        assert self.parent is not None  # noqa: S101 - for the type
        return self.parent.name, None, f"{self.parent.name} {self.token}"
