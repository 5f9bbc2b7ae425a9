"""The rows of `make test-processors` name every setting, reach the processes that compute, and claim nothing untried."""

import doctest
import os
import subprocess
import sys

import pytest

from tests import processors
from tests.processors import ROWS, closing_counts, missing_flags, narrowing


def test_examples():
    assert doctest.testmod(processors).failed == 0


def test_every_setting_is_in_some_row():
    asked = {
        "MKL_ENABLE_INSTRUCTIONS": {"SSE4_2", "AVX2", "AVX512"},
        "ATEN_CPU_CAPABILITY": {"default", "avx2"},
        "ONEDNN_MAX_CPU_ISA": {"AVX2"},
        "XLA_FLAGS": {"--xla_cpu_max_isa=AVX2"},
        "OMP_NUM_THREADS": {"1", "2"},
    }
    for name, values in asked.items():
        assert values <= {row.variables.get(name) for row in ROWS.values()}


def test_a_row_that_the_processor_cannot_run_is_not_tried():
    assert missing_flags(ROWS["avx512"], "flags\t\t: fpu avx2 avx512dq") == ["avx512f"]
    assert missing_flags(ROWS["avx512"], "flags\t\t: fpu avx2 avx512f") == []
    assert missing_flags(ROWS["sse4"], "") == []


def test_an_output_without_an_end_is_no_pass():
    assert closing_counts("Killed") == "it did not come to its end"
    assert closing_counts("2 passed in 0.1s\n") == "2 passed in 0.1s"
    assert narrowing(ROWS["sse4"], "2 passed in 0.1s\n") == []


ASKED = """
import os
from selfattn_core.conformance.environment import environment
import torch
print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())
print(sorted((name, environment({}, processes=2)[name]) for name in %r))
"""


@pytest.mark.parametrize("name", ["sse4"])
def test_settings_reach_the_processes_that_compute(name):
    """Those that the kit starts too, whose environment it makes."""
    variables = ROWS[name].variables
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
