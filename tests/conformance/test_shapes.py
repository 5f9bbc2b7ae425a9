"""The shapes of answers are known before anything is compared or stored."""

import numpy as np
import pytest

from selfattn_core import SelfAttentionConfig
from selfattn_core.conformance.cases.case import Case, Run
from selfattn_core.conformance.cases.inputs import inputs
from selfattn_core.conformance.cases.table import CASES
from selfattn_core.conformance.execution.events import Answered, Unanswered
from selfattn_core.conformance.execution.in_process import ask
from selfattn_core.conformance.questions.ask import answers
from selfattn_core.conformance.questions.shapes import answer_shapes, misshapen
from selfattn_core.conformance.reference import Reference

# numpy has no bfloat16, and cannot measure memory everywhere.
SMALL = [
    case
    for case in CASES
    if np.prod(case.shape) * case.shape[1] * case.shape[2] < 200_000
    and case.family != "memory"
    and set(case.dtypes) != {"bfloat16"}
]
CASE = Case("mine", "forward", "", SelfAttentionConfig(24))
RUN = Run(CASE, "float32", "channels_last")


@pytest.mark.parametrize("case", SMALL, ids=[case.id for case in SMALL])
def test_they_are_those_of_the_definition(case):
    dtype = "float16" if case.narrow else case.dtypes[0]
    with np.errstate(all="ignore"):
        found = answers(Reference(), case, inputs(case, dtype), dtype, "channels_last")
    assert {name: np.shape(value) for name, value in found.items()} == answer_shapes(case)
    assert misshapen(case, found) == ""


def test_a_case_of_memory_asks_for_one_number_and_its_answers():
    case = next(case for case in CASES if case.family == "memory")
    assert answer_shapes(case) == {"bytes": (), "y": (1, 64, 96, 8)}


def test_a_stretched_answer_is_refused_and_a_stretched_extra_is_emptied():
    class Stretched(Reference):
        def forward(self, model, x):
            return np.broadcast_to(super().forward(model, x)[:1], (10**9, 5, 7, 24))

    class Extra(Reference):
        def vjp(self, model, x, dy):
            return super().vjp(model, x, dy) | {"extra": np.broadcast_to(dy[:1], (10**9, 5, 7, 24))}

    refused = ask(Stretched(), RUN)
    assert refused == Unanswered("fail", "y: got shape (1000000000, 5, 7, 24), expected (2, 5, 7, 24)")
    answer = ask(Extra(), Run(Case("mine", "vjp", "", SelfAttentionConfig(24)), "float32", "channels_last"))
    assert isinstance(answer, Answered)
    assert answer.arrays[list(answer.names).index("extra")].size == 0
