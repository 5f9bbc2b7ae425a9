"""Every backend of this library, over the whole case table, each in a process of its own."""

import pytest

from selfattn_core.conformance import REGISTRY
from selfattn_core.conformance.report import as_table
from selfattn_core.conformance.runner import run_backend


@pytest.mark.parametrize("name", REGISTRY)
def test_backend_is_conformant(name):
    report = run_backend(name)
    assert report.passed, as_table([report])
    unclaimed = {(o.run.case.family, o.run.layout) for o in report.outcomes if o.status == "unclaimed"}
    if name.startswith("flax"):
        assert {layout for _, layout in unclaimed} == {"channels_first"}, "Flax is channels-last"
    else:
        assert not unclaimed
