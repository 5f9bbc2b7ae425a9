"""The table of cases is frozen, and its cases test what their titles announce."""

import dataclasses
from pathlib import Path

from selfattn_core.conformance.cases.families import FAMILIES, LEVELS
from selfattn_core.conformance.cases.table import CASES
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
