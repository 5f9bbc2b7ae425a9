"""For all tests: JAX compiles once what several need, and threads of OpenMP wait without taking the cores of others."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from selfattn_core.conformance.execution.environment import kept_programs
from tests import processes
from tests.processes import pytest_addoption, pytest_pycollect_makemodule, pytest_xdist_make_scheduler

__all__ = ["pytest_addoption", "pytest_pycollect_makemodule", "pytest_xdist_make_scheduler"]

PROGRAMS = pytest.StashKey[Path]()


def pytest_configure(config):
    processes.enter(config)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A folder for each process of xdist, whose controller runs no tests.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and config.getoption("numprocesses", None) is None:
        config.stash[PROGRAMS] = Path(tempfile.mkdtemp(prefix="selfattn-tests-programs-"))
        os.environ |= kept_programs(config.stash[PROGRAMS])


def pytest_unconfigure(config):
    if PROGRAMS in config.stash:
        for name in kept_programs(config.stash[PROGRAMS]):
            os.environ.pop(name, None)
        shutil.rmtree(config.stash[PROGRAMS], ignore_errors=True)
