"""For all tests: JAX compiles once what several need, and threads of OpenMP wait without taking the cores of others."""

import os
import shutil
import tempfile

import pytest

PROGRAMS = "JAX_COMPILATION_CACHE_DIR"
KEEPS_ALL = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
MADE = pytest.StashKey[str]()


def pytest_configure(config):
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A folder for each process of xdist, whose controller runs no tests: JAX does not write its files atomically.
    if PROGRAMS not in os.environ and config.getoption("numprocesses", None) is None:
        config.stash[MADE] = tempfile.mkdtemp(prefix="selfattn-tests-programs-")
        os.environ |= {PROGRAMS: config.stash[MADE], **KEEPS_ALL}


def pytest_unconfigure(config):
    if MADE in config.stash:
        for name in (PROGRAMS, *KEEPS_ALL):
            os.environ.pop(name, None)
        shutil.rmtree(config.stash[MADE], ignore_errors=True)
