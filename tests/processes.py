"""Tests that need an interpreter of their own, each an item of the session that was started.

Keras fixes its backend when it is imported, and JAX its number of devices when it starts. So the files of the folders in
`FOLDERS` are read and not imported: each of their tests is an item for each process that it is for, as in
`test_layer.py::test_x[jax]`. The first item of a process starts it, with all the items of that process that were
selected. It reports on each test, and the items look their reports up.

    python -m pytest tests/backends/keras -k "test_x and jax"     selects as usual
    python -m pytest tests/backends/keras --in-process jax        runs the tests of one process here, for a debugger
"""

import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from tests.processors import environment

TIMEOUT = 900
OUTPUT_SHOWN = 4000


@dataclass(frozen=True)
class Process:
    """An interpreter and what it runs of a folder.

    Args:
        name: stands in brackets behind the names of its tests.
        variables: of its environment; flags of XLA are added to those that are there.
        only: the files that it runs; by default all.
        without: files that it does not run.
        slow: whether its tests are marked so.
    """

    name: str
    variables: Mapping[str, str]
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    slow: bool = False

    def runs(self, file: str) -> bool:
        """Whether the tests of a file are for this process."""
        return file not in self.without and (not self.only or file in self.only)


KERAS = {name: {"KERAS_BACKEND": name} for name in ("tensorflow", "jax", "torch")}
X64 = {"JAX_ENABLE_X64": "1"}
DEVICES = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}

FOLDERS: Mapping[str, tuple[Process, ...]] = {
    "tests/backends/keras": (
        Process("tensorflow", KERAS["tensorflow"]),
        # In JAX float64 exists only where the process asked for it, which users mostly have not: both are tested.
        Process("jax", KERAS["jax"], without=("test_layer.py",)),
        Process("jax-x64", KERAS["jax"] | X64, only=("test_layer.py", "test_weights.py"), slow=True),
        Process("torch", KERAS["torch"]),
    ),
    "tests/backends/devices": (Process("eight", KERAS["jax"] | DEVICES),),
    # What is refused is the same on each of them, but for what a layer computes.
    "tests/porting/keras": (
        Process("tensorflow", KERAS["tensorflow"], only=("test_convert.py",), slow=True),
        Process("jax", KERAS["jax"], only=("test_convert.py",), slow=True),
        Process("torch", KERAS["torch"]),
    ),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options of a process that runs such tests."""
    group = parser.getgroup("processes")
    group.addoption("--in-process", metavar="NAME", help="run the tests that are for this process, here")
    group.addoption(
        "--report-to", metavar="FILE", help="run the functions that FILE lists and append a report of each"
    )


def enter(config: pytest.Config) -> None:
    """Make this process the one that `--in-process` names."""
    name = config.getoption("--in-process")
    if name is None:
        return
    known = {process.name: process for folder in FOLDERS.values() for process in folder}
    if name not in known:
        raise pytest.UsageError(f"--in-process: got {name!r}; expected one of {', '.join(known)}")
    if early := {"jax", "keras", "tensorflow", "torch"} & set(sys.modules):
        raise pytest.UsageError(f"--in-process {name}: {', '.join(sorted(early))} is imported already")
    variables = known[name].variables
    os.environ.update(environment({"TF_CPP_MIN_LOG_LEVEL": "3", **variables}))
    if not set(X64) <= set(variables):
        os.environ.pop(*X64, None)
    if path := config.getoption("--report-to"):
        config.pluginmanager.register(Reporter(config, Path(path)))


class Reporter:
    """Runs what it is asked for and writes each report as soon as it is there, since a crash may follow.

    Args:
        config: of the session.
        path: a file whose first line is the list of functions to run. The others are appended.
    """

    def __init__(self, config: pytest.Config, path: Path) -> None:
        self.config, self.path = config, path
        self.asked = set(json.loads(path.read_text(encoding="utf-8")))

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out what nobody asked for."""
        items[:] = [item for item in items if item.nodeid.partition("[")[0] in self.asked]
        self._write({"collected": [item.nodeid for item in items]})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Write why a file cannot be imported."""
        if report.failed:
            self._write({"broken": report.nodeid, "error": report.longreprtext})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write a report in pytest's own form."""
        self._write(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))

    def _write(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(line))


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Read a file of such a folder instead of importing it, unless this is its process."""
    folder = module_path.parent.relative_to(parent.config.rootpath).as_posix()
    if folder not in FOLDERS:
        return None
    name = parent.config.getoption("--in-process")
    if name is None:
        return Elsewhere.from_parent(parent, path=module_path)
    here = any(process.runs(module_path.name) for process in FOLDERS[folder] if process.name == name)
    return None if here else Nothing.from_parent(parent, path=module_path)


def scope(nodeid: str) -> str | None:
    """What one worker of xdist has to run alone: all tests of a process; None for other tests."""
    folder = PurePosixPath(nodeid.partition("::")[0]).parent.as_posix()
    return f"{folder}[{nodeid.rpartition('[')[2]}" if folder in FOLDERS else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under `--dist loadfile`, give all tests of a process to one worker, or each worker would start that process."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByProcess(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid) or super()._split_scope(nodeid)

    return ByProcess(config, log)


class Nothing(pytest.File):
    """A file of which this process runs nothing."""

    def collect(self) -> list[pytest.Item]:
        """Find no tests."""
        return []


class Elsewhere(pytest.File):
    """A file of tests that are run elsewhere."""

    def collect(self) -> Iterator[pytest.Item]:
        """Find the functions called `test_…`, once for each process."""
        tree = ast.parse(self.path.read_text(encoding="utf-8"))
        tests = [node for node in tree.body if _is_test(node)]
        if hidden := [node.name for node in ast.walk(tree) if _is_test(node) and node not in tests]:
            raise self.CollectError(
                f"{self.path}: {', '.join(hidden)} must stand at the top level. Where a test is not for every process, "
                "mark it with skipif."
            )
        for process in FOLDERS[self.path.parent.relative_to(self.config.rootpath).as_posix()]:
            for test in tests if process.runs(self.path.name) else ():
                yield Test.from_parent(
                    self, name=f"{test.name}[{process.name}]", process=process, function=test
                )


def _is_test(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name.startswith("test_")


class Test(pytest.Item):
    """A test function in a process, with all its parameters."""

    def __init__(self, *, process: Process, function: ast.FunctionDef, **options: Any) -> None:
        super().__init__(**options)
        self.process, self.line = process, function.lineno - 1
        self.function_id = f"{self.parent.nodeid}::{function.name}"
        if process.slow:
            self.add_marker("slow")

    def runtest(self) -> None:
        """Look up what the process reported, which is started if it has not been."""
        runs = self.session.stash.setdefault(RUNS, {})
        if self.key not in runs:
            tests = [item for item in self.session.items if isinstance(item, Test)]
            runs[self.key] = Run.of([test for test in tests if test.key == self.key])
        runs[self.key].judge(self)

    @property
    def key(self) -> tuple[Path, str]:
        """Equal for the items of one process."""
        return self.path.parent, self.process.name

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The text of the process's own failure, without the way of it to here."""
        return (
            str(excinfo.value)
            if isinstance(excinfo.value, FailedElsewhereError)
            else super().repr_failure(excinfo)
        )

    def reportinfo(self) -> tuple[Path, int, str]:
        """Where the test stands."""
        return self.path, self.line, self.name


class FailedElsewhereError(Exception):
    """A test that failed elsewhere, or of which nothing was heard."""


@dataclass
class Run:
    """What a process reported.

    Args:
        asked: ids of the functions that it was to run.
        ending: how it ended; empty if it ended well.
        output: what it printed.
        broken: why a file could not be imported, by its id.
        collected: ids of its tests.
        reports: on each of them.
    """

    asked: list[str]
    ending: str
    output: str
    broken: dict[str, str] = field(default_factory=dict)
    collected: list[str] = field(default_factory=list)
    reports: dict[str, list[pytest.TestReport]] = field(default_factory=dict)

    @classmethod
    def of(cls, items: list[Test]) -> "Run":
        """Start the process of these items and wait for its end."""
        config, asked = items[0].config, [item.function_id for item in items]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "reports"
            path.write_text(json.dumps(asked), encoding="utf-8")
            command = [sys.executable, "-m", "pytest", "-v", "--continue-on-collection-errors"]
            command += ["--in-process", items[0].process.name, "--report-to", str(path)]
            output = Path(folder) / "output"
            with output.open("wb") as file:
                try:
                    status = subprocess.run(
                        [*command, *sorted({str(item.path) for item in items})],
                        cwd=config.rootpath,
                        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        timeout=TIMEOUT,
                        check=False,
                    ).returncode
                    ending = f"it ended with {status}" if status else ""
                except subprocess.TimeoutExpired:
                    ending = f"it did not end in {TIMEOUT} s"
            run = cls(asked, ending, output.read_text(encoding="utf-8", errors="replace"))
            for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()[1:]):
                run._take(config, line)
        return run

    def _take(self, config: pytest.Config, line: dict[str, Any]) -> None:
        if "collected" in line:
            self.collected = line["collected"]
        elif "broken" in line:
            self.broken[line["broken"]] = line["error"]
        else:
            report = config.hook.pytest_report_from_serializable(config=config, data=line)
            self.reports.setdefault(report.nodeid, []).append(report)

    def judge(self, item: Test) -> None:
        """Raise what the reports on an item say, and an error if they do not show that all of it ran."""
        tests = self._tests(item.function_id)
        reports = [report for test in tests for report in self.reports.get(test, ())]
        if failed := [report for report in reports if report.failed]:
            raise FailedElsewhereError("\n\n".join(map(_text, failed)))
        if item.parent.nodeid in self.broken:
            raise FailedElsewhereError(self.broken[item.parent.nodeid])
        if not self._finished(item.function_id) or (self.ending and not self._explained()):
            raise FailedElsewhereError(
                f"The process {item.process.name!r} did not report that all of {item.function_id} passed: "
                f"{self.ending or 'it ended well'}. The end of what it printed:\n{self.output[-OUTPUT_SHOWN:]}"
            )
        skipped = [report for report in reports if report.skipped]
        if len(skipped) == len(tests):
            pytest.skip(_reason(skipped[0]))
        if skipped:
            reasons = "\n".join(f"{report.nodeid}: {_reason(report)}" for report in skipped)
            item.add_report_section("call", "skipped", reasons)

    def _tests(self, function: str) -> list[str]:
        """The tests of a function, one for each set of its parameters."""
        return [test for test in self.collected if test.partition("[")[0] == function]

    def _finished(self, function: str) -> bool:
        """Whether a function was found, and every test of it came to its end."""
        tests = self._tests(function)
        return bool(tests) and all(
            any(report.when == "teardown" for report in self.reports.get(test, ())) for test in tests
        )

    def _explained(self) -> bool:
        """Whether the reports show why the process did not end well."""
        failed = any(report.failed for reports in self.reports.values() for report in reports)
        return failed or not all(map(self._finished, self.asked))


RUNS = pytest.StashKey[dict[tuple[Path, str], Run]]()


def _reason(report: pytest.TestReport) -> str:
    return report.longrepr[2].removeprefix("Skipped: ")


def _text(report: pytest.TestReport) -> str:
    parts = [f"{report.nodeid}, {report.when}:", report.longreprtext]
    return "\n".join([*parts, *(f"--- {name} ---\n{text}" for name, text in report.sections)])
