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
import traceback
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from selfattn_core.conformance.backends import NotABackendError, resolve
from selfattn_core.conformance.cases.case import Run
from selfattn_core.conformance.cases.table import CASES
from selfattn_core.conformance.execution.devices import DeviceAbsentError, DeviceUnknownError, chosen
from selfattn_core.conformance.execution.events import (
    Answered,
    Failed,
    Finished,
    Measured,
    Measuring,
    Ready,
    Started,
    Unanswered,
    write,
)
from selfattn_core.conformance.execution.in_process import ask
from selfattn_core.conformance.protocol import Claims, expected_failures_of, takes_device
from selfattn_core.conformance.verdicts.product_formats import measured

__all__ = ["end_with_parent", "main"]


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
        try:
            backend = resolve(job["target"])
            device, about = _device(backend, job["device"], stack)
            claims = Claims.of(backend)
            ready = Ready(
                {str(name): str(version) for name, version in backend.versions().items()},
                sorted(claims.abilities),
                list(claims.layouts),
                list(claims.dtypes),
                {key: list(why) for key, why in expected_failures_of(backend).items()},
                {"name": device, **about},
            )
            write(progress, ready)
        except (NotABackendError, DeviceUnknownError) as error:
            write(progress, Failed(str(error), refused=True))
            return
        except DeviceAbsentError as error:
            write(progress, Failed(str(error), absent=True))
            return
        except Exception:
            write(progress, Failed(traceback.format_exc(limit=-3).strip()))
            return
        unmeasured = ""
        if job["shipped"] and "shipped" in claims.abilities:
            # Of its own, for this may raise, hang or crash, and what is known of the backend by now is to be kept.
            write(progress, Measuring())
            try:
                write(progress, Measured(measured(backend.default_products)))
            except Exception:
                unmeasured = f"the framework's own products: {traceback.format_exc(limit=-3).strip()}"
        cases = {case.id: case for case in CASES}
        for index, case, dtype, layout in job["runs"]:
            run = Run(cases[case], dtype, layout)
            if not claims.covers(run):
                continue
            if unmeasured:
                write(progress, Unanswered("error", unmeasured), index)
                continue
            write(progress, Started(), index)
            answer = ask(backend, replace(run, layout=claims.layout(run)), job["seed"], device=device)
            if isinstance(answer, Answered):
                np.savez(Path(job["folder"]) / f"{index}.npz", *answer.arrays, allow_pickle=False)
            write(progress, answer, index)
        write(progress, Finished())


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


if __name__ == "__main__":
    end_with_parent()
    main(sys.argv[1])
