"""Asks a backend in this process. Workers, the self-test and the calibration all ask this way."""

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
from selfattn_core.conformance.protocol import Backend, Build, Claims, declined
from selfattn_core.conformance.questions.ask import answers
from selfattn_core.conformance.questions.peak_memory import PeakUnknownError
from selfattn_core.conformance.results import Outcome
from selfattn_core.conformance.verdicts.outcomes import outcome_of
from selfattn_core.conformance.verdicts.product_formats import coarsest, measured

__all__ = ["ask", "judge_in_process", "malformed"]


def ask(backend: Any, run: Run, seed: int = 0, *, device: str = "", build: Build | None = None) -> Answer:
    """Ask a backend one run.

    Args:
        backend: one that claims the run.
        run: in a layout that the backend has.
        seed: of the inputs.
        device: the one that answers must come from; empty for a backend that takes none.
        build: makes the layer in place of `Backend.build`.
    """
    began = time.perf_counter()
    try:
        if reason := declined(backend, run.case.config):
            return Unanswered("unclaimed", reason)
        given = inputs(run.case, run.dtype, seed)
        if device:
            backend.places()
        # Overflow and NaN are what some cases are about.
        with np.errstate(all="ignore"):
            found = answers(backend, run.case, given, run.dtype, run.layout, seed, build=build)
        seconds = round(time.perf_counter() - began, 4)
        if problem := malformed(found) or _misplaced(backend, device):
            return Unanswered("fail", problem)
        return Answered(list(found), seconds, [widen(np.asarray(value)) for value in found.values()])
    except Exception as error:
        # In any other case, a backend could avoid a run with this error.
        if isinstance(error, PeakUnknownError) and "memory" in run.case.needs:
            return Unanswered("unclaimed", str(error))
        return Unanswered("error", traceback.format_exc(limit=-3).strip())


def judge_in_process(
    backend: Backend, runs: Iterable[Run], seed: int = 0, *, builds: Callable[[Run], Build] | None = None
) -> Iterator[Outcome]:
    """The outcomes of the runs that a backend claims.

    Args:
        backend: any, as long as its framework may share this process.
        runs: to ask; those that the backend does not claim are left out.
        seed: of the inputs.
        builds: the function that makes the layer of a run, in place of `Backend.build`.
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
    """What makes an answer unfit to be compared, by its types; empty if nothing does.

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
        elif widen(np.asarray(value)).dtype.kind not in "fiubc":
            problems.append(f"{name}: got an array of dtype {value.dtype}, expected numbers")
    return "; ".join(problems)


def _misplaced(backend: Any, device: str) -> str:
    """Why answers do not count as computed on the device that was asked for; empty if they do."""
    if not device:
        return ""
    places = set(backend.places())
    if not places:
        return f"places() named no device after an answer, where {device} was asked for"
    strange = sorted(places - {device})
    return f"answers lay on {', '.join(strange)}, where {device} was asked for" if strange else ""
