"""The process of a backend in a search. It answers one probe after another.

`process.Process` starts it as `python -m selfattn_core.conformance.search.worker TARGET DEVICE`. Each line of its standard
input is a token. An answer on its standard output is a line of JSON, and then the bytes of the arrays that the line lists.
The process ends when its standard input closes, as it does when the search ends. What the backend prints goes to standard
error.
"""

import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any, BinaryIO

from selfattn_core.arrays import Array
from selfattn_core.conformance.backends import NotABackendError, resolve
from selfattn_core.conformance.execution.devices import DeviceAbsentError, DeviceUnknownError
from selfattn_core.conformance.execution.worker import on_device, over_processes
from selfattn_core.conformance.protocol import Claims, declined
from selfattn_core.conformance.search.asking import MalformedError, ask_steps
from selfattn_core.conformance.search.drawing import searched_claims
from selfattn_core.conformance.search.probe import Probe
from selfattn_core.conformance.search.token import from_token

__all__ = ["main"]


def main(target: str, device: str) -> None:
    """Answer probes until standard input closes.

    Args:
        target: "module:object".
        device: the device to compute on. Empty for none.
    """
    tokens, answers = _channels()
    with ExitStack() as stack:
        try:
            backend = resolve(target)
            name, about = on_device(backend, device, stack)
            over_processes(backend, None, stack)
            claims = searched_claims(backend)
            ready: dict[str, Any] = {
                "event": "ready",
                "versions": {str(key): str(value) for key, value in backend.versions().items()},
                "abilities": sorted(Claims.of(backend).abilities),
                "searched": sorted(claims.abilities),
                "layouts": list(claims.layouts),
                "dtypes": list(claims.dtypes),
                "device": {"name": name, "model": "", "driver": "", **about},
            }
        except (NotABackendError, DeviceUnknownError) as error:
            _tell(answers, {"event": "failed", "error": str(error), "refused": True, "absent": False})
            return
        except DeviceAbsentError as error:
            _tell(answers, {"event": "failed", "error": str(error), "refused": False, "absent": True})
            return
        except Exception:
            words = traceback.format_exc(limit=-3).strip()
            _tell(answers, {"event": "failed", "error": words, "refused": False, "absent": False})
            return
        _tell(answers, ready)
        while True:
            _tell(answers, *_answer(backend, from_token(tokens.get())))


def _answer(backend: Any, probe: Probe) -> tuple[dict[str, Any], list[Array]]:
    try:
        if reason := declined(backend, probe.config):
            return {"event": "declined", "message": reason}, []
        found = ask_steps(backend, probe)
    except MalformedError as error:
        return {"event": "malformed", "message": str(error)}, []
    except Exception as error:
        words = traceback.format_exc(limit=-3).strip()
        return {"event": "raised", "type": type(error).__name__, "message": words}, []
    arrays = [array for step in found.steps for array in step.values()]
    event = {
        "event": "answered",
        "names": [list(step) for step in found.steps],
        "arrays": [[str(array.dtype), list(array.shape)] for array in arrays],
        "touched": [[each.what, each.step, each.name] for each in found.touched],
    }
    return event, arrays


def _channels() -> tuple["queue.SimpleQueue[str]", BinaryIO]:
    """The tokens that arrive, and the stream for the answers. The backend gets an empty input, and prints to the error stream."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    arriving = os.fdopen(os.dup(0), encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    tokens: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        with suppress(OSError):
            for line in arriving:
                tokens.put(line.strip())
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return tokens, answers


def _tell(stream: BinaryIO, event: dict[str, Any], arrays: Sequence[Array] = ()) -> None:
    stream.write((json.dumps(event) + "\n").encode())
    for array in arrays:
        stream.write(array.tobytes())
    stream.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
