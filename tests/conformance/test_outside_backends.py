"""Two backends that share no code with this library are conformant, checked with the command as users would.

The command runs all values. JAX needs a second to compile each derivative, so only a few of each family run here.
`selfattn conform examples.outside_backends.pure_jax:Backend` runs them all.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from selfattn_core.conformance.cases.table import all_runs
from selfattn_core.conformance.execution.runner import run_backend

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "outside_backends"
POOLED = "MultiHeadAttention cannot pool keys after projecting them"
CLAIMS = {"pure_jax": ["forward", "map", "params", "r1", "vjp"], "keras_mha": ["forward", "map", "r1", "vjp"]}
REASONS = {"pure_jax": set(), "keras_mha": {POOLED}}
FEW = re.compile(r"SA-(VJP-00[1-5]|GAN-00[12]|TRN-00[14]|PAR-00[12]|MIX-001|SPN-001)/float32/channels_last")


@pytest.mark.parametrize("name", CLAIMS)
def test_it_shares_none_of_our_code(name):
    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", source, re.MULTILINE))
    assert imported <= {"jax", "keras", "numpy", "collections", "dataclasses", "functools", "os", "typing"}


@pytest.mark.parametrize("name", CLAIMS)
def test_its_values_conform(name):
    command = [sys.executable, "-c", "from selfattn_core.cli import main; main(prog_name='selfattn')"]
    result = subprocess.run(
        [*command, "conform", f"examples.outside_backends.{name}:Backend", "--level", "core", "--json", "-"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    (backend,) = json.loads(result.stdout)["backends"]
    assert backend["passed"]
    assert backend["claims"] == CLAIMS[name]
    assert backend["level"] == ("core" if name == "pure_jax" else None)
    outcomes = [outcome for outcome in backend["outcomes"] if outcome["layout"] == "channels_last"]
    unclaimed = [outcome for outcome in outcomes if outcome["status"] == "unclaimed"]
    assert {outcome["message"] for outcome in unclaimed} == REASONS[name]
    assert {outcome["status"] for outcome in outcomes} == {"pass"} | (
        {"unclaimed"} if REASONS[name] else set()
    )
    assert {outcome["family"] for outcome in outcomes if outcome["status"] == "pass"} == {
        outcome["family"] for outcome in outcomes
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", CLAIMS)
def test_its_derivatives_conform(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = [run for run in all_runs() if FEW.fullmatch(run.id)]
    report = run_backend(f"examples.outside_backends.{name}:Backend", runs=runs)
    assert report.passed, report
    unclaimed = {o.run.case.family for o in report.outcomes if o.status == "unclaimed" and not o.message}
    assert unclaimed == {"mixed", "spectral_norm"} | ({"params"} if name == "keras_mha" else set())
    declined = {outcome.message for outcome in report.outcomes if outcome.message}
    assert declined == REASONS[name]
    assert {o.run.case.family for o in report.outcomes if o.status == "pass"} >= {"vjp", "r1", "trajectory"}
