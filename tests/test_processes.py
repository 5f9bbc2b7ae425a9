"""Tests that are run in a process of their own are items that pass, fail and skip as they do there, whatever that process does."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.processes import scope

ROOT = Path(__file__).parents[1]

CONFTEST = """
import os, pathlib
from tests import processes
from tests.processes import Process, pytest_addoption, pytest_pycollect_makemodule, pytest_xdist_make_scheduler

processes.FOLDERS = {
    "far": (
        Process("one", {"PLACE": "one"}, only=("test_ways.py", "test_more.py")),
        Process("two", {"PLACE": "two"}, only=("test_more.py",), slow=True),
        Process("crashes", {}, only=("test_crash.py",)),
        Process("broken", {}, only=("test_broken.py", "test_missing.py", "test_whole.py")),
        Process("late", {}, only=("test_late.py",)),
    )
}
processes.TIMEOUT = int(os.environ.get("TIMEOUT", 100))

def pytest_configure(config):
    processes.enter(config)
    config.addinivalue_line("markers", "slow: takes long")
    if name := config.getoption("--in-process"):
        with pathlib.Path("started").open("a") as file:
            file.write(name + " ")
"""

FILES = {
    "test_ways.py": """
        import pytest

        def test_passes():
            pass

        @pytest.mark.parametrize("x", [1, 2, 3])
        def test_fails_once(x):
            print("x is", x)
            assert x != 2, "two is wrong"

        @pytest.fixture
        def unclean():
            yield
            raise OSError("not cleaned up")

        def test_fails_afterwards(unclean):
            pass

        @pytest.mark.skip(reason="not today")
        def test_skipped():
            pass

        @pytest.mark.parametrize("x", [1, 2])
        def test_skipped_once(x):
            if x == 1:
                pytest.skip("one is skipped")
    """,
    "test_more.py": """
        import os, pathlib

        def test_its_own_environment():
            with pathlib.Path("places").open("a") as file:
                file.write(os.environ["PLACE"] + " ")
    """,
    "test_crash.py": """
        import os
        import pytest

        def test_before():
            pass

        @pytest.mark.parametrize("x", [1, 2])
        def test_crashes(x):
            if x == 2:
                os.abort()

        def test_after():
            pass
    """,
    "test_broken.py": """
        import no_such_module

        def test_of_a_broken_file():
            pass
    """,
    "test_whole.py": """
        def test_of_a_file_beside_it():
            pass
    """,
    "test_missing.py": """
        def test_gone():
            pass

        del test_gone
    """,
    "test_late.py": """
        import atexit, os

        atexit.register(os._exit, 7)

        def test_before_the_end():
            pass
    """,
}

PASSED = {
    "test_passes[one]",
    "test_skipped_once[one]",
    "test_its_own_environment[one]",
    "test_its_own_environment[two]",
    "test_before[crashes]",
    "test_of_a_file_beside_it[broken]",
}
FAILED = {
    "test_fails_once[one]": "two is wrong",
    "test_fails_afterwards[one]": "not cleaned up",
    "test_crashes[crashes]": "ended with -6",
    "test_after[crashes]": "ended with -6",
    "test_of_a_broken_file[broken]": "no_such_module",
    "test_gone[broken]": "ended with 1",
    "test_before_the_end[late]": "ended with 7",
}
SKIPPED = {"test_skipped[one]": "not today"}


@pytest.fixture
def project(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n", encoding="utf-8")
    (tmp_path / "conftest.py").write_text(CONFTEST, encoding="utf-8")
    (tmp_path / "far").mkdir()
    for name, text in FILES.items():
        lines = [line.removeprefix(" " * 8) for line in text.splitlines()]
        (tmp_path / "far" / name).write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def run(project, *arguments, **environment):
    """The exit status, what was printed, and the testcases of the report for JUnit by name."""
    report = project / "report.xml"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "xdist", f"--junit-xml={report}", *arguments],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    cases = ET.parse(report).iter("testcase")  # noqa: S314 - our own file
    return done.returncode, done.stdout, {case.get("name"): case for case in cases}


def words(path):
    return sorted(path.read_text(encoding="utf-8").split()) if path.exists() else []


def test_each_item_has_the_outcome_of_its_process(project):
    status, _, cases = run(project)
    assert status == 1
    assert set(cases) == PASSED | set(FAILED) | set(SKIPPED)
    for name, case in cases.items():
        outcomes = {child.tag: child.get("message", "") + (child.text or "") for child in case}
        outcomes.pop("system-out", None)
        expected = {"failure"} if name in FAILED else {"skipped"} if name in SKIPPED else set()
        assert set(outcomes) == expected, name
        assert (FAILED | SKIPPED).get(name, "") in "".join(outcomes.values()), name
    assert "x is 2" in cases["test_fails_once[one]"].find("failure").text
    assert words(project / "started") == ["broken", "crashes", "late", "one", "two"]
    assert words(project / "places") == ["one", "two"]


def test_two_workers_start_each_process_once(project):
    status, _, cases = run(project, "-n", "2", "--dist", "loadfile", "-k", "passes or environment")
    assert (status, len(cases)) == (0, 3)
    assert words(project / "started") == words(project / "places") == ["one", "two"]


def test_what_was_not_selected_is_not_run(project):
    status, printed, cases = run(project, "-rs", "-k", "one and (passes or skipped)", "-m", "not slow")
    assert status == 0
    assert set(cases) == {"test_passes[one]", "test_skipped[one]", "test_skipped_once[one]"}
    assert "not today" in printed
    assert words(project / "started") == ["one"]


def test_a_process_can_be_this_one(project):
    status, _, cases = run(project, "--in-process", "one", "-k", "passes or once")
    assert status == 1
    assert set(cases) == {
        "test_passes",
        *(f"test_fails_once[{x}]" for x in (1, 2, 3)),
        *(f"test_skipped_once[{x}]" for x in (1, 2)),
    }
    assert words(project / "started") == ["one"]


def test_a_process_that_does_not_end_fails(project):
    (project / "far" / "test_more.py").write_text(
        "import time\ndef test_sleeps():\n    time.sleep(60)\n", encoding="utf-8"
    )
    status, _, cases = run(project, "-k", "sleeps and two", TIMEOUT="3")
    assert status == 1
    assert "did not end in 3 s" in cases["test_sleeps[two]"].find("failure").text


def test_a_test_that_would_go_unseen_is_an_error(project):
    (project / "far" / "test_more.py").write_text(
        "if True:\n    def test_hidden():\n        pass\n", encoding="utf-8"
    )
    status, printed, _ = run(project, "far/test_more.py")
    assert status == 2
    assert "test_hidden must stand at the top level" in printed


def test_a_worker_has_all_tests_of_a_process():
    """Under `--dist loadfile`, which else gives each file to any worker."""
    keras = "tests/backends/keras"
    assert scope(f"{keras}/test_layer.py::test_x[jax]") == scope(f"{keras}/test_maps.py::test_y[jax]")
    assert scope(f"{keras}/test_layer.py::test_x[jax]") != scope(f"{keras}/test_layer.py::test_x[torch]")
    assert scope("tests/core/test_spec.py::test_x[jax]") is None
