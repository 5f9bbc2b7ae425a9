"""Every built-in backend passes every case, each in its own process.

Here each case runs in one dtype and layout. They alternate, so that every family runs in all of them. `make conform` runs
every case in every dtype and layout.
"""

import itertools

import pytest

from selfattn_core.conformance import REGISTRY
from selfattn_core.conformance.cases.case import LAYOUTS
from selfattn_core.conformance.cases.table import CASES, all_runs
from selfattn_core.conformance.execution.runner import run_backend
from selfattn_core.conformance.report import as_data, as_table

# Keras on torch does not compile.
LEVELS = dict.fromkeys(REGISTRY, "deploy") | {"keras-torch": "gan"}
UNCLAIMED = {"keras-tensorflow": {"per_sample"}, "keras-torch": {"compiled", "per_sample"}}


def layouts(name):
    """Flax is channels-last."""
    return LAYOUTS[:1] if name.startswith("flax") else LAYOUTS


# These share the attention itself and, on JAX, the compiler, which needs a second for a derivative. So each runs only its
# part of the families below.
GROUPS = (("keras-jax", "flax-nnx", "flax-linen"), ("torch", "keras-torch"), ("keras-tensorflow",))
SHARED = ("forward", "map", "vjp", "r1", "mixed", "spectral_norm", "dtype", "compiled", "large")


def by_case(runs):
    return [list(group) for _, group in itertools.groupby(runs, key=lambda run: run.case.id)]


def in_turns(name):
    """One run of each case."""
    grouped = by_case(run for run in all_runs() if run.layout in layouts(name))
    (sharing,) = (group for group in GROUPS if name in group)
    # Of the cases with several runs, two have their first run, the next two their second, and so on.
    several = itertools.accumulate(len(runs) > 1 for runs in by_case(all_runs()))
    return [
        group[count // 2 % len(group)]
        for turn, (count, group) in enumerate(zip(several, grouped, strict=True))
        if group[0].case.family not in SHARED or sharing[turn % len(sharing)] == name
    ]


@pytest.mark.parametrize("name", REGISTRY)
def test_backend_is_conformant(name):
    report = run_backend(name, runs=in_turns(name))
    assert report.passed, as_table(as_data([report]))
    unclaimed = {outcome.run.case.family for outcome in report.outcomes if outcome.status == "unclaimed"}
    assert unclaimed == UNCLAIMED.get(name, set())
    assert set(report.layouts) == set(layouts(name))
    assert set(report.dtypes) == {"float32", "float64", "bfloat16", "float16"}
    assert report.level == LEVELS[name]


@pytest.mark.parametrize("names", GROUPS)
def test_the_turns_leave_nothing_out(names):
    runs = [run for name in names for run in in_turns(name)]
    assert {run.case for run in runs} == set(CASES)
    for family in ("forward", "vjp", "r1"):
        met = {(run.dtype, run.layout) for run in runs if run.case.family == family}
        assert met == {
            ("float32", "channels_last"),
            ("float64", "channels_last"),
            ("float32", "channels_first"),
        }
