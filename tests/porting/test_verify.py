"""An output of a port has the limits of the conformance kit."""

import numpy as np
import pytest

from selfattn_core import SelfAttentionConfig, spec
from selfattn_core.conformance.cases.case import Case
from selfattn_core.conformance.cases.inputs import inputs
from selfattn_core.conformance.verdicts.expected import expect_on
from selfattn_core.conformance.verdicts.tolerance import FACTORS
from selfattn_core.porting.verify import check_output


@pytest.mark.parametrize(("share", "outcome"), [(0.9, "passed"), (1.1, "failed")])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_output_may_be_off_by_as_much_as_in_the_kit(dtype, share, outcome):
    case = Case("port", "forward", "port", SelfAttentionConfig(16, kv_pool=2))
    given = inputs(case, dtype)
    floor = expect_on(case, given, given, dtype)["y"].floor
    wide = {name: value.astype(np.float64) for name, value in given.params.items()}
    y = spec.forward(case.config, wide, given.x.astype(np.float64))
    y.flat[0] += share * FACTORS[dtype] * floor
    # y is float64, so the parameters are what the limits follow.
    params = {name: value.astype(dtype) for name, value in given.params.items()}
    assert check_output("y", case.config, params, given.x, y).outcome == outcome
