"""Running cases on a backend in this process. Workers, the self-test and the calibration use this."""

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from selfattn_core.arrays import widen
from selfattn_core.conformance.cases.case import Run
from selfattn_core.conformance.cases.families import FAMILIES
from selfattn_core.conformance.cases.inputs import inputs
from selfattn_core.conformance.execution.events import Answer, Answered, Unanswered
from selfattn_core.conformance.execution.outcomes import outcome_of
from selfattn_core.conformance.protocol import Backend, Build, Claims, declined
from selfattn_core.conformance.questions.ask import answers
from selfattn_core.conformance.questions.peak_memory import PeakUnknownError
from selfattn_core.conformance.questions.shapes import answer_shapes, misshapen
from selfattn_core.conformance.results import Outcome
from selfattn_core.conformance.verdicts.product_formats import coarsest, measured

__all__ = ["ask", "judge_in_process", "malformed"]


def ask(backend: Any, run: Run, seed: int = 0, *, device: str = "", build: Build | None = None) -> Answer:
    """The answer of a backend to one run.

    Args:
        backend: a backend that claims the run.
        run: the run, in a layout that the backend has.
        seed: the seed of the inputs.
        device: the device that must hold the answers. Empty for a backend that accepts none.
        build: builds the layer in place of `Backend.build`.
    """
    began = time.perf_counter()
    try:
        if reason := declined(backend, run.case.config):
            return Unanswered("unclaimed", reason)
        given = inputs(run.case, run.dtype, seed)
        if device:
            backend.places()
        # Some cases test overflow and NaN.
        with np.errstate(all="ignore"):
            found = answers(backend, run.case, given, run.dtype, run.layout, seed, build=build)
        seconds = round(time.perf_counter() - began, 4)
        if problem := malformed(found) or misshapen(run.case, found) or _misplaced(backend, device):
            return Unanswered("fail", problem)
        # The comparison needs the names of quantities that were not asked for, and not their values.
        asked = answer_shapes(run.case)
        arrays = [widen(np.asarray(value)) if name in asked else np.zeros(0) for name, value in found.items()]
        return Answered(list(found), seconds, arrays)
    except Exception as error:
        # Outside of memory cases, a backend could use this error to avoid a run.
        if isinstance(error, PeakUnknownError) and "memory" in run.case.needs:
            return Unanswered("unclaimed", str(error))
        return Unanswered("error", traceback.format_exc(limit=-3).strip())


def judge_in_process(
    backend: Backend, runs: Iterable[Run], seed: int = 0, *, builds: Callable[[Run], Build] | None = None
) -> Iterator[Outcome]:
    """The outcomes of the runs that a backend claims.

    Args:
        backend: a backend whose framework may share this process.
        runs: the runs. Those that the backend does not claim are left out.
        seed: the seed of the inputs.
        builds: returns the function that builds the layer of a run, in place of `Backend.build`.
    """
    claims = Claims.of(backend)
    claimed = [replace(run, layout=claims.layout(run)) for run in runs if claims.covers(run)]
    label = "float32"
    if any(FAMILIES[run.case.family].default_precision for run in claimed):
        label = coarsest(measured(backend.default_products))
    for run in claimed:
        answer = ask(backend, run, seed, build=None if builds is None else builds(run))
        yield outcome_of(run, answer, seed, label)


def malformed(found: Any) -> str:
    """The types in an answer that prevent its comparison. Empty if it can be compared.

    Example:
        >>> malformed({"y": [1.0]})
        'y: got list, expected a numpy array of numbers'
    """
    if not isinstance(found, Mapping):
        return f"got {type(found).__name__}, expected a mapping of names to numpy arrays"
    problems = []
    for name, value in found.items():
        if not isinstance(name, str):
            problems.append(f"got the name {name!r}, expected a string")
        if not isinstance(value, np.ndarray | np.generic):
            problems.append(f"{name}: got {type(value).__name__}, expected a numpy array of numbers")
        elif value.dtype.name != "bfloat16" and value.dtype.kind not in "fiubc":
            problems.append(f"{name}: got an array of dtype {value.dtype}, expected numbers")
    return "; ".join(problems)


def _misplaced(backend: Any, device: str) -> str:
    """The reason why answers do not count as computed on the requested device. Empty if they do."""
    if not device:
        return ""
    places = set(backend.places())
    if not places:
        return f"places() named no device after an answer, expected {device}"
    strange = sorted(places - {device})
    return f"answers are on {', '.join(strange)}, expected {device}" if strange else ""
