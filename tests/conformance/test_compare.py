"""Comparing the answers of one run with the spec."""

import numpy as np

from selfattn_core.conformance.backends import resolve
from selfattn_core.conformance.cases.case import Run
from selfattn_core.conformance.cases.inputs import inputs
from selfattn_core.conformance.cases.table import CASES
from selfattn_core.conformance.verdicts.compare import compare
from selfattn_core.conformance.verdicts.tolerance import FACTOR


def test_a_run_may_be_one_of_a_table_of_ones_own(on_path):
    run = Run(CASES[0], "float32", "channels_last")
    backend = resolve("toy_backends:Good")
    given = inputs(run.case, run.dtype)
    y = backend.forward(backend.build(run.case.config, given.params, run.dtype, run.layout), given.x)
    assert compare(run, {"y": y}).status == "pass"
    assert compare(run, {"y": y * np.float32(1.001)}).ratio > FACTOR
