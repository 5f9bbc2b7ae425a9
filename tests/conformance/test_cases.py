"""The table of cases is frozen, and its cases test what their titles announce."""

import dataclasses
from pathlib import Path

from selfattn_core.conformance.cases.families import FAMILIES, LEVELS
from selfattn_core.conformance.cases.table import CASES, all_runs
from selfattn_core.conformance.execution.in_process import judge_in_process
from selfattn_core.conformance.reference import Reference
from tests.conformance.runs import FEW

HERE = Path(__file__).parent


def test_ids_are_unique_and_every_family_is_there():
    assert len({case.id for case in CASES}) == len(CASES)
    assert {case.family for case in CASES} == set(FAMILIES)
    assert sorted(family for families in LEVELS.values() for family in families) == sorted(FAMILIES)
    assert {case.id[:6] for case in CASES if case.family == "vjp"} == {"SA-VJP"}


def described(case) -> str:
    """A case as a line. Fields that only some cases use are at the end."""
    line = (
        f"{case.id} {case.family} {_options(case.config)} {case.shape} "
        f"gamma {case.gamma} logits {case.logits} {'constant ' if case.constant else ''}: {case.title}"
    )
    further = {
        field.name: getattr(case, field.name)
        for field in dataclasses.fields(case)[8:]
        if getattr(case, field.name) != field.default
    }
    return " ".join([line, *(f"[{name} {value}]" for name, value in further.items())])


def test_cases_are_frozen():
    """Ids, layers and sizes are frozen, because reports of different versions are compared by them."""
    listing = "\n".join(described(case) for case in CASES)
    assert listing + "\n" == (HERE / "golden_cases.txt").read_text(encoding="utf-8")


def _options(config):
    """The values of a config. spectral_norm is newer than the first cases, so it appears only if it is True."""
    values = tuple(config.to_dict().values())
    return values if config.spectral_norm else values[:-1]


def test_every_ability_is_needed_by_a_case():
    assert set().union(*(case.needs for case in CASES)) == Reference().claims() | {"memory"}


def asked(case) -> tuple:
    """What a case asks, apart from sizes."""
    form = case.family if case.family in ("compiled", "saved", "per_sample") else ""
    return case.computation, form, case.eager, case.config.spectral_norm, case.gamma == 0


def test_every_quantity_is_asked_in_float64():
    """Initial weights are float32. Side effects, memory and the default precision do not depend on the dtype."""
    values = [
        case
        for case in CASES
        if case.computation not in ("init", "evaluation") and case.family not in ("memory", "shipped")
    ]
    for level in LEVELS:
        met = {
            dtype: {asked(case) for case in values if case.asked_at(level) and dtype in case.dtypes}
            for dtype in ("float32", "float64")
        }
        assert met["float32"] == met["float64"]


def test_every_family_runs_in_both_layouts_below_deploy():
    """Apart from those that have one layout, and from related calls, which pass through the layout of y."""
    runs = all_runs(level="gan")
    both = {run.case.family for run in runs if run.layout == "channels_first"}
    assert {run.case.family for run in runs if FAMILIES[run.case.family].every_layout} - both == {
        "sizes",
        "batch",
    }


def test_what_only_deploy_asks_is_asked_there():
    late = [case for case in CASES if case.late]
    below, deployed = ({run.case for run in all_runs(level=level)} for level in ("gan", "deploy"))
    assert late
    assert below.isdisjoint(late)
    assert deployed == set(CASES)


def test_no_forward_case_can_see_the_key_bias():
    class WithoutKeyBias(Reference):
        def build(self, config, params, dtype, layout):
            return super().build(
                config, {n: 0 * a if n == "key.bias" else a for n, a in params.items()}, dtype, layout
            )

    outcomes = list(judge_in_process(WithoutKeyBias(), FEW))
    status = {
        family: {o.status for o in outcomes if o.run.case.family == family} for family in ("forward", "map")
    }
    assert status == {"forward": {"pass"}, "map": {"pass"}}
    assert "fail" in {o.status for o in outcomes if o.run.case.family == "params"}
