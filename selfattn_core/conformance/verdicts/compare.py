"""Judging one run: most quantities by the noise floor, some bit for bit, and initial weights by their distribution."""

from collections.abc import Iterable, Mapping
from functools import lru_cache

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.conformance.cases.case import SIXTEEN_BITS, Case, Run
from selfattn_core.conformance.cases.families import FAMILIES
from selfattn_core.conformance.cases.inputs import inputs
from selfattn_core.conformance.questions.ask import INITIAL_DRAWS
from selfattn_core.conformance.questions.training import reference, trained
from selfattn_core.conformance.results import Outcome
from selfattn_core.conformance.verdicts.expected import expect, expect_shipped
from selfattn_core.conformance.verdicts.initialisation import distribution_verdicts
from selfattn_core.conformance.verdicts.tolerance import SHIPPED_FACTORS, Expectation, Verdict, judge
from selfattn_core.conformance.verdicts.trajectory import curve_floors, judge_trajectory
from selfattn_core.params import parameter_table, state_table

__all__ = ["compare", "memory_limit"]


def compare(run: Run, found: Mapping[str, Array], seed: int = 0, label: str = "float32") -> Outcome:
    """Judge the answers of one run.

    Args:
        run: the run.
        found: the answers, an array for each quantity.
        seed: the seed of the inputs.
        label: the format of `FORMATS` in which the family "shipped" is judged.
    """
    family, computation = run.case.family, run.case.computation
    losses: tuple[float, ...] = ()
    reference_losses: tuple[float, ...] = ()
    floors: tuple[float, ...] = ()
    if computation == "trajectory":
        if problem := _names(found, list(trained(run.case))):
            return Outcome(run, "fail", (), problem)
        verdicts = list(judge_trajectory(run.case, found, run.dtype, seed))
        losses = tuple(float(loss) for loss in found["loss"])
        reference_losses = tuple(float(loss) for loss in reference(run.case, seed).losses)
        floors = tuple(float(floor) for floor in curve_floors(run.case, run.dtype, seed))
    elif computation == "init":
        every = [*parameter_table(run.case.config), *state_table(run.case.config)]
        names = [f"{draw}: {name}" for draw in range(INITIAL_DRAWS) for name in every]
        if problem := _names(found, names):
            return Outcome(run, "fail", (), problem)
        verdicts = distribution_verdicts(run.case.config, found)
    elif FAMILIES[family].default_precision:
        wanted = _shipped_expectations(run.case, label, seed)
        if problem := _names(found, list(wanted)):
            return Outcome(run, "fail", (), problem, label=label)
        factor = SHIPPED_FACTORS[label]
        verdicts = [judge(name, found[name], want, run.dtype, factor=factor) for name, want in wanted.items()]
    else:
        weighed = computation in ("params", "saved", "spectral_norm")
        exact = inputs(run.case, run.dtype, seed).params if weighed else {}
        measured = ["bytes"] if family == "memory" else []
        if computation == "spectral_norm" or run.case.passes:
            # A training pass may change only the state.
            exact = {name: array for name, array in exact.items() if name in parameter_table(run.case.config)}
        if computation == "evaluation":
            given = inputs(run.case, run.dtype, seed)
            exact = {f"weight {name}": array for name, array in given.params.items()}
            exact |= {"argument x": given.x, "argument dy": given.dy}
        kept = computation == "params" and not run.case.passes
        close = {} if kept else _expectations(run.case, run.dtype, seed)
        close = {name: value for name, value in close.items() if name not in exact}
        if problem := _names(found, [*measured, *close, *exact]):
            return Outcome(run, "fail", (), problem)
        verdicts = [_memory(run.case, int(found[name])) for name in measured]
        verdicts += [judge(name, found[name], want, run.dtype) for name, want in close.items()]
        stored = {name: _as_given(found[name], run.dtype) for name in exact}
        verdicts += [_bits(name, stored[name], want, "that was given") for name, want in exact.items()]
        if family == "determinism":
            verdicts += [
                _bits(name, found[name], found["y"], "of the first call") for name in ("again", "rebuilt")
            ]
    messages = _messages(run.case, verdicts)
    return Outcome(
        run,
        "fail" if messages else "pass",
        tuple(verdicts),
        "; ".join(messages),
        losses=losses,
        reference=reference_losses,
        floors=floors,
        label=label if FAMILIES[family].default_precision else "",
    )


_TIES = (
    "pooling windows of this case contain equal values: the first of them in row-major order gets the whole gradient of its "
    "window, so it is neither shared nor given to another"
)


def memory_limit(case: Case) -> int:
    """The bytes of one N×N array in float32. The memory of a case of the family "memory" must stay below this."""
    _, height, width = case.shape
    return (height * width) ** 2 * 4


# Enough for the cases of one level in all dtypes. A larger cache would hold arrays that are not used again.
@lru_cache(maxsize=512)
def _expectations(case: Case, dtype: str, seed: int) -> Mapping[str, Expectation]:
    return expect(case, dtype, seed)


@lru_cache(maxsize=32)
def _shipped_expectations(case: Case, label: str, seed: int) -> Mapping[str, Expectation]:
    return expect_shipped(case, label, seed)


def _messages(case: Case, verdicts: Iterable[Verdict]) -> list[str]:
    """Why quantities did not pass, and the rule that the case is about."""
    messages = [verdict.message for verdict in verdicts if not verdict.passed]
    return [*messages, _TIES] if messages and case.tied else messages


def _as_given(array: Array, dtype: str) -> Array:
    """An answer in the dtype in which the kit passes numbers: 16-bit ones as float32."""
    return array.astype(np.float32) if dtype in SIXTEEN_BITS and array.dtype == dtype else array


def _bits(name: str, got: Array, want: Array, which: str) -> Verdict:
    same = got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()
    message = (
        ""
        if same
        else f"{name}: {got.dtype} {got.shape} is not bit for bit the {want.dtype} {want.shape} {which}"
    )
    return Verdict(name, 0.0 if same else np.inf, 0.0 if same else np.inf, same, message)


def _memory(case: Case, rise: int) -> Verdict:
    limit = memory_limit(case)
    fits = rise < limit
    message = (
        ""
        if fits
        else f"memory rose by {rise / 2**20:.0f} MiB, expected less than one N×N array ({limit / 2**20:.0f} MiB)"
    )
    return Verdict("bytes", float(rise), 0.0 if fits else np.inf, fits, message)


def _names(found: Mapping[str, object], wanted: list[str]) -> str:
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    parts = [f"missing {', '.join(missing)}"] if missing else []
    parts += [f"unexpected {', '.join(extra)}"] if extra else []
    return "; ".join(parts)
