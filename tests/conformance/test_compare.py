"""Comparing the answers of one run with the spec."""

import numpy as np

from selfattn_core.conformance.backends import resolve
from selfattn_core.conformance.cases.case import Run
from selfattn_core.conformance.cases.inputs import inputs
from selfattn_core.conformance.cases.table import CASES
from selfattn_core.conformance.execution.in_process import judge_in_process
from selfattn_core.conformance.mutants import MUTANTS
from selfattn_core.conformance.reference import Reference
from selfattn_core.conformance.verdicts.compare import compare
from selfattn_core.conformance.verdicts.tolerance import FACTOR


def test_a_run_may_be_one_of_a_table_of_ones_own(on_path):
    run = Run(CASES[0], "float32", "channels_last")
    backend = resolve("toy_backends:Good")
    given = inputs(run.case, run.dtype)
    y = backend.forward(backend.build(run.case.config, given.params, run.dtype, run.layout), given.x)
    assert compare(run, {"y": y}).status == "pass"
    assert compare(run, {"y": y * np.float32(1.001)}).ratio > FACTOR


def test_a_failure_of_a_case_about_ties_states_the_rule_for_ties():
    """A layer that shares the gradient among equal values, as a maximum over an axis does in JAX."""
    to_the_last = next(
        mutant for mutant in MUTANTS if mutant.name.endswith("window to the last of equal values")
    )
    by_id = {case.id: case for case in CASES}
    rule = "the first of them in row-major order gets the whole gradient of its window"
    runs = [Run(by_id[id_], "float32", "channels_last") for id_ in ("SA-VJP-026", "SA-VJP-006")]
    tied, apart = judge_in_process(to_the_last.make(), runs)
    assert tied.status == "fail"
    assert tied.message.endswith("so it is neither shared nor given to another")
    assert rule in tied.message
    assert apart.status == "pass"
    (right,) = judge_in_process(Reference(), runs[:1])
    assert right.message == ""
    no_row_sum = next(mutant for mutant in MUTANTS if mutant.name == "softmax gradient without the row sum")
    (untied,) = judge_in_process(no_row_sum.make(), runs[1:])
    assert untied.status == "fail"
    assert rule not in untied.message
