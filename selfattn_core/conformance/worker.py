"""One backend in its own process: it computes the cases it is asked for and writes the answers to a folder.

Started by the runner as `python -m selfattn_core.conformance.worker JOB.json`, after the environment that a backend
needs has been set. What it prints is only kept for the report of a failure.

The folder receives `progress.jsonl`, one line when the backend is up, one before each run and one after it, so that a
crash names the run that it happened in, and `<index>.npz` with the answers of that run.
"""

import json
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfattn_core.conformance.backend import Backend, resolve
from selfattn_core.conformance.cases import CASES, Case, Inputs, inputs

Array = NDArray[Any]


def answers(backend: Backend, case: Case, given: Inputs, dtype: str, layout: str) -> Mapping[str, Array]:
    """What a backend says to a case, by quantity."""
    model = backend.build(case.config, given.params, dtype, layout)
    if case.family == "forward":
        return {"y": backend.forward(model, given.x)}
    if case.family == "map":
        return {"map": backend.attention_map(model, given.x)}
    if case.family == "vjp":
        return backend.vjp(model, given.x, given.dy)
    if case.family == "r1":
        value, gradients = backend.r1(model, given.x, given.dy)
        return {"r1": np.array(value, np.float64), **gradients}
    return backend.params(model)


def main(job_file: str) -> None:
    """Run the job that the file describes."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    folder = Path(job["folder"])
    cases = {case.id: case for case in CASES}
    with (folder / "progress.jsonl").open("w", encoding="utf-8") as progress:

        def tell(**line: object) -> None:
            progress.write(json.dumps(line) + "\n")
            progress.flush()

        try:
            backend = resolve(job["target"])
            tell(
                event="ready",
                name=backend.name,
                versions=dict(backend.versions()),
                claims=sorted(backend.claims()),
                layouts=list(backend.layouts()),
            )
        except Exception:
            tell(event="failed", error=traceback.format_exc(limit=-3))
            return
        for index, run in enumerate(job["runs"]):
            case = cases[run["case"]]
            if case.family not in backend.claims() or run["layout"] not in backend.layouts():
                continue
            tell(event="started", run=index)
            try:
                given = inputs(case, run["dtype"], job["seed"])
                found = answers(backend, case, given, run["dtype"], run["layout"])
                arrays = [np.asarray(value) for value in found.values()]
                np.savez(folder / f"{index}.npz", *arrays, allow_pickle=False)
                tell(event="answered", run=index, names=list(found))
            except Exception:
                tell(event="raised", run=index, error=traceback.format_exc(limit=-3))
        tell(event="finished")


if __name__ == "__main__":
    main(sys.argv[1])
