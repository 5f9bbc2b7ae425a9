"""The rows of `make test-processors` name every setting, reach the processes that compute, and keep what is there."""

import os
import subprocess
import sys

import pytest

from tests.processors import ROWS, environment, settings


def test_every_setting_is_in_some_row():
    asked = {
        "MKL_ENABLE_INSTRUCTIONS": {"SSE4_2", "AVX2", "AVX512"},
        "ATEN_CPU_CAPABILITY": {"default", "avx2"},
        "ONEDNN_MAX_CPU_ISA": {"AVX2"},
        "XLA_FLAGS": {"--xla_cpu_max_isa=AVX2"},
        "OMP_NUM_THREADS": {"1", "2"},
    }
    for name, values in asked.items():
        assert values <= {settings(row, "GenuineIntel").get(name) for row in ROWS.values()}


@pytest.mark.parametrize(("vendor", "told"), [("GenuineIntel", None), ("AuthenticAMD", "COMPATIBLE")])
def test_mkl_is_told_in_the_way_that_it_hears_on_a_processor(vendor, told):
    assert settings(ROWS["baseline"], vendor).get("MKL_CBWR") == told
    assert "MKL_CBWR" not in settings(ROWS["avx2"], vendor)


def test_flags_of_the_caller_are_kept(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    found = environment(settings(ROWS["baseline"], "GenuineIntel"))["XLA_FLAGS"]
    assert found.split() == ["--xla_backend_optimization_level=0", "--xla_cpu_max_isa=AVX"]
    assert environment({})["XLA_FLAGS"] == "--xla_backend_optimization_level=0"


ASKED = """
from selfattn_core.conformance.execution.environment import environment
import torch
print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())
print(sorted((name, environment({}, processes=2)[name]) for name in %r))
"""


def test_settings_reach_the_processes_that_compute():
    """Those that the kit starts too, whose environment it makes."""
    variables = settings(ROWS["baseline"], "GenuineIntel")
    done = subprocess.run(
        [sys.executable, "-c", ASKED % sorted(variables)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    told, found = done.stdout.splitlines()
    assert told == "DEFAULT 1"
    assert found == str(sorted(variables.items()))
