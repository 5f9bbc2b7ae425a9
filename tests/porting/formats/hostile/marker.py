"""A pickle that leaves a trace if anything runs it."""

import pickle
from pathlib import Path


class Payload:
    """Pickles as a call that writes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (exec, (f"import pathlib; pathlib.Path({str(self.trace)!r}).write_text('executed')",))


def pickled(trace: Path, protocol: int = 2) -> bytes:
    return pickle.dumps({"gamma": Payload(trace)}, protocol=protocol)
