"""One backend in its own process: it computes the cases it is asked for and writes the answers to a folder.

Started by the runner as `python -m selfattn_core.conformance.execution.worker JOB.json`, after the environment that a backend
needs has been set, with a standard input that lasts as long as the runner. What it prints is only kept for the report
of a failure.

The folder receives `progress-<k>.jsonl` for the k-th process of a backend, one line when the backend is up, one before
each run and one after it, so that a crash names the run that it happened in, and `<index>.npz` with the answers of
that run.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from selfattn_core.arrays import widen
from selfattn_core.conformance.cases.inputs import inputs
from selfattn_core.conformance.cases.run import Run, chosen_layout, is_claimed
from selfattn_core.conformance.cases.table import CASES
from selfattn_core.conformance.execution.devices import DeviceAbsentError, DeviceUnknownError, chosen
from selfattn_core.conformance.protocol import (
    NotABackendError,
    declined,
    dtypes_of,
    expected_failures_of,
    resolve,
    takes_device,
)
from selfattn_core.conformance.questions.ask import answers
from selfattn_core.conformance.questions.peak_memory import PeakUnknownError
from selfattn_core.conformance.verdicts.product_formats import measured

__all__ = ["end_with_parent", "main", "malformed"]


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


def end_with_parent() -> None:
    """End this process when standard input does, which the runner holds open as long as it lives.

    A runner that is killed can end nobody, and a backend that hangs would stay for ever. What the backend reads from
    standard input is empty.
    """
    watched = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def watch() -> None:
        # A backend may close what it did not open; that is no end of the runner.
        with suppress(OSError):
            if not os.read(watched, 1):
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(job_file: str) -> None:
    """Run the job that the file describes."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    with Path(job["progress"]).open("w", encoding="utf-8") as progress, ExitStack() as stack:

        def tell(**line: object) -> None:
            progress.write(json.dumps(line) + "\n")
            progress.flush()

        try:
            backend = resolve(job["target"])
            device, about = _device(backend, job["device"], stack)
            claims, layouts, dtypes = set(backend.claims()), list(backend.layouts()), dtypes_of(backend)
            tell(
                event="ready",
                name=str(backend.name),
                versions={str(name): str(version) for name, version in backend.versions().items()},
                claims=sorted(claims),
                layouts=layouts,
                dtypes=list(dtypes),
                expected_failures={key: list(why) for key, why in expected_failures_of(backend).items()},
                device={"name": device, **about},
            )
        except (NotABackendError, DeviceUnknownError) as error:
            tell(event="failed", error=str(error), refused=True)
            return
        except DeviceAbsentError as error:
            tell(event="failed", error=str(error), absent=True)
            return
        except Exception:
            tell(event="failed", error=traceback.format_exc(limit=-3))
            return
        unmeasured = ""
        if job["shipped"] and "shipped" in claims:
            # Of its own, for this may raise, hang or crash, and what is known of the backend by now is to be kept.
            tell(event="measuring")
            try:
                tell(event="measured", precisions=measured(backend.default_products))
            except Exception:
                unmeasured = f"the framework's own products: {traceback.format_exc(limit=-3)}"
        _answer(backend, device, job, (claims, layouts, dtypes), tell, unmeasured)
        tell(event="finished")


def _device(backend: Any, asked: str, stack: ExitStack) -> tuple[str, dict[str, str]]:
    """The name of the device that all is computed on until the stack ends, and what the backend says about it."""
    if not takes_device(backend):
        if asked:
            raise DeviceUnknownError(
                f"got device {asked!r}; this backend takes none: it has no methods devices, on and places."
            )
        return "", {}
    device = chosen(asked or "cpu", backend.devices())
    said = stack.enter_context(backend.on(device)) or {}
    return device, {name: str(said.get(name, "")) for name in ("model", "driver")}


def _answer(
    backend: Any,
    device: str,
    job: Mapping[str, Any],
    has: tuple[set[str], Sequence[str], Sequence[str]],
    tell: Callable[..., None],
    unmeasured: str,
) -> None:
    """Compute the runs of a job that are claimed; none of them where what they are held to could not be measured."""
    cases = {case.id: case for case in CASES}
    for asked in job["runs"]:
        run = Run(cases[asked["case"]], asked["dtype"], asked["layout"])
        if not is_claimed(run, *has):
            continue
        index = asked["index"]
        if unmeasured:
            tell(event="raised", run=index, error=unmeasured)
            continue
        tell(event="started", run=index)
        began = time.perf_counter()
        try:
            if reason := declined(backend, run.case.config):
                tell(event="declined", run=index, reason=reason)
                continue
            given = inputs(run.case, run.dtype, job["seed"])
            if device:
                backend.places()
            found = answers(backend, run.case, given, run.dtype, chosen_layout(run, has[1]), job["seed"])
            seconds = round(time.perf_counter() - began, 4)
            if problem := malformed(found) or _misplaced(backend, device):
                tell(event="malformed", run=index, error=problem)
                continue
            arrays = [widen(np.asarray(value)) for value in found.values()]
            np.savez(Path(job["folder"]) / f"{index}.npz", *arrays, allow_pickle=False)
            tell(event="answered", run=index, names=list(found), seconds=seconds)
        except Exception as error:
            # In any other family it would be a way for a backend to get rid of a run.
            if isinstance(error, PeakUnknownError) and run.case.family == "memory":
                tell(event="declined", run=index, reason=str(error))
            else:
                tell(event="raised", run=index, error=traceback.format_exc(limit=-3))


def _misplaced(backend: Any, device: str) -> str:
    """Why answers do not count as computed on the device that was asked for; empty if they do."""
    if not device:
        return ""
    places = set(backend.places())
    if not places:
        return f"places() named no device after an answer, where {device} was asked for"
    strange = sorted(places - {device})
    return f"answers lay on {', '.join(strange)}, where {device} was asked for" if strange else ""


if __name__ == "__main__":
    end_with_parent()
    main(sys.argv[1])
