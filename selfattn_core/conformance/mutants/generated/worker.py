"""The process in which generated mutants run. It reads one mutant in each line, and answers with one line.

A mutant may loop for ever, or fill the memory. A timer of the processor ends the process then, and its memory is limited.
"""

import importlib.abc
import importlib.util
import json
import resource
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np

from selfattn_core import spec
from selfattn_core.conformance.backends import resolve
from selfattn_core.conformance.mutants.generated.asked import first_failure
from selfattn_core.conformance.protocol import Backend
from selfattn_core.conformance.reference import Reference

__all__ = ["main"]


class _Replaced(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a changed source.

    Args:
        module: its name.
        source: the source.
    """

    def __init__(self, module: str, source: str) -> None:
        self.module, self.source = module, source

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 - the import system passes it
        target: ModuleType | None = None,  # noqa: ARG002 - as above
    ) -> ModuleSpec | None:
        """The changed module, and nothing else."""
        return importlib.util.spec_from_loader(fullname, self) if fullname == self.module else None

    def exec_module(self, module: ModuleType) -> None:
        """Run the changed source."""
        # The source is that of this library with one changed expression.
        exec(compile(self.source, f"<mutant of {self.module}>", "exec"), module.__dict__)  # noqa: S102


def main(seconds: float, gigabytes: float) -> None:
    """Answer the mutants on standard input.

    Args:
        seconds: the time of the processor that each mutant may take.
        gigabytes: the memory that the process may have.
    """
    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        asked = json.loads(line)
        # Its default action ends the process, whatever the mutant does.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer = _answer(asked)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _answer(asked: dict[str, Any]) -> dict[str, str]:
    try:
        with np.errstate(all="ignore"):
            found = first_failure(
                _backend(asked), asked["seed"], large=bool(asked["target"]), probes=asked["probes"]
            )
    except Exception as error:
        return {"how": "exception", "run": "", "message": f"{type(error).__name__}: {error}"}
    return {"how": "", "run": "", "message": ""} if found is None else asdict(found)


def _backend(asked: dict[str, Any]) -> Backend:
    finder = _Replaced(asked["module"], asked["source"])
    if asked["target"]:
        sys.meta_path.insert(0, finder)
        return resolve(asked["target"])
    # The expected values need the definition as it is, so the changed one is a module beside it.
    module = ModuleType(spec.__name__)
    finder.exec_module(module)
    return Reference(module)


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]))
