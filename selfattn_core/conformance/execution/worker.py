"""The process of one backend. It computes the runs of a job and writes the answers to a folder.

The supervisor starts it as `python -m selfattn_core.conformance.execution.worker JOB.json`, in the environment that the
backend needs. Its standard input stays open as long as the supervisor lives. Its output is used only to report a failure.

The k-th process of a backend writes `progress-<k>.jsonl`: one line when the backend has started, one before each run and
one after it. If it crashes, the last line shows in which run. The arrays of a run are in `<index>.npz`.
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

__all__ = ["end_with_parent", "main", "on_device", "over_processes"]


def end_with_parent() -> None:
    """End this process when standard input closes, which happens when the parent process ends.

    A parent that is killed cannot end its children, and a backend that hangs would run for ever. The backend itself gets
    an empty standard input.
    """
    watched = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def watch() -> None:
        # The backend may close this file. That does not mean that the parent has ended.
        with suppress(OSError):
            if not os.read(watched, 1):
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(job_file: str) -> None:
    """Run the job in a file."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    with Path(job["progress"]).open("w", encoding="utf-8") as progress, ExitStack() as stack:
        try:
            backend = resolve(job["target"])
            device, about = on_device(backend, job["device"], stack)
            over_processes(backend, job["over"], stack)
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
            # A separate event, because this may raise, hang or crash, and the report needs the facts in `Ready` anyway.
            write(progress, Measuring())
            try:
                write(progress, Measured(measured(backend.default_products)))
            except Exception:
                unmeasured = f"the framework's default products: {traceback.format_exc(limit=-3).strip()}"
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


def on_device(backend: Any, asked: str, stack: ExitStack) -> tuple[str, dict[str, str]]:
    """Select a device until the stack closes.

    Args:
        backend: the backend.
        asked: the device. If empty, a backend that accepts devices uses the CPU.
        stack: the stack that ends the selection.

    Returns:
        The name of the device, and its model and driver.

    Raises:
        DeviceUnknownError: if the backend accepts no device, or has none of this name.
        DeviceAbsentError: if this machine does not have the device.
    """
    if not takes_device(backend):
        if asked:
            raise DeviceUnknownError(
                f"got device {asked!r}; this backend accepts none: it has no methods devices, on and places."
            )
        return "", {}
    device = chosen(asked or "cpu", backend.devices())
    said = stack.enter_context(backend.on(device)) or {}
    return device, {name: str(said.get(name, "")) for name in ("model", "driver")}


def over_processes(backend: Any, count: int | None, stack: ExitStack) -> None:
    """Let a backend compute over several processes until the stack closes.

    Args:
        backend: the backend.
        count: the number of processes. None for the backend's own choice.
        stack: the stack that ends the processes.

    Raises:
        NotABackendError: if there is a number, and the backend computes in one process.
    """
    if getattr(backend, "over", None) is not None:
        stack.enter_context(backend.over(count))
    elif count is not None:
        raise NotABackendError(f"got {count} processes; this backend computes in one: it has no method over.")


if __name__ == "__main__":
    end_with_parent()
    main(sys.argv[1])
