"""The process of an artifact: it opens the file, describes it, and runs one input after the other.

If the runtime crashes, only this process ends. Questions are lines of JSON on standard input. Answers are lines of JSON on
the original standard output. Arrays are files in a folder.
"""

import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from selfattn_core.installed import imported
from selfattn_core.verifying.artifact import Artifact, Tensor

__all__ = ["main"]

_LONGEST = 400


def main(job_file: str) -> None:
    """Open the artifact of a job, then answer until the other end closes.

    Args:
        job_file: JSON with "target", "artifact", "input", "outputs" and "folder".
    """
    channel = _private_output()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    module, _, function = job["target"].partition(":")
    try:
        artifact = getattr(imported(module), function)(
            job["artifact"], input_name=job["input"], output_names=tuple(job["outputs"])
        )
    except Exception as error:
        _tell(channel, {"event": "refused", "error": _words(error)})
        return
    _tell(channel, {"event": "opened", **_described(artifact)})
    folder = Path(job["folder"])
    for line in _lines():
        asked = json.loads(line)
        try:
            x = _cast(np.load(folder / "x.npy", allow_pickle=False), asked["dtype"])
            outputs = artifact.run(x, asked["input"], tuple(asked["outputs"]))
            for number, output in enumerate(outputs):
                np.save(folder / f"output-{number}.npy", _wide(output), allow_pickle=False)
        except Exception as error:
            _tell(channel, {"event": "raised", "error": _words(error)})
            continue
        _tell(channel, {"event": "answered", "dtypes": [str(output.dtype) for output in outputs]})


def _lines() -> Iterator[str]:
    """The questions. This process ends with its parent, even during an answer, because a runtime may never finish."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield lines.get()


def _private_output() -> TextIO:
    """Standard output for this module only. Output of the runtimes goes to standard error."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


def _tell(channel: TextIO, event: dict[str, Any]) -> None:
    channel.write(f"{json.dumps(event)}\n")
    channel.flush()


def _described(artifact: Artifact) -> dict[str, Any]:
    def tensor(each: Tensor) -> dict[str, Any]:
        return {"name": each.name, "dtype": each.dtype, "shape": each.shape}

    return {
        "inputs": [tensor(each) for each in artifact.inputs],
        "outputs": [tensor(each) for each in artifact.outputs],
        "versions": dict(artifact.versions),
        "formats": sorted(artifact.formats),
        "notes": list(artifact.notes),
    }


def _cast(x: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype == "bfloat16":
        import ml_dtypes

        return x.astype(ml_dtypes.bfloat16)
    return x.astype(dtype)


def _wide(output: NDArray[Any]) -> NDArray[Any]:
    """The array in a dtype that numpy's files support, which bfloat16 is not."""
    return output if output.dtype.kind in "fiub" else output.astype(np.float32)


def _words(error: Exception) -> str:
    """The exception in one line. Messages of runtimes may have many lines and repetitions."""
    words = " ".join("".join(traceback.format_exception_only(error)).split())
    return words if len(words) <= _LONGEST else f"{words[: _LONGEST - 1]}…"


if __name__ == "__main__":
    main(sys.argv[1])
