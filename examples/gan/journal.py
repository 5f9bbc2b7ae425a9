"""The numbers of a training, step by step: a table, and scalars for TensorBoard if its writer is installed."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from selfattn_core.files.writing import write_atomically
from selfattn_core.installed import missing_modules

__all__ = ["HISTORY", "Journal", "read"]

HISTORY = "history.csv"
_SCALARS = "tensorboard"


class Journal:
    """Numbers of one training, written to `history.csv` and, if tensorboardX is installed, to `tensorboard/`.

    Args:
        folder: folder of the run.
        step: first step of the training. Rows of this and later steps, from an interrupted run, are dropped.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self._path = folder / HISTORY
        self._rows = read(folder)[:step] if step else []
        self._writer = None
        if missing_modules(["tensorboardX"]):
            print(
                f"   No scalars for TensorBoard: pip install tensorboardX. {self._path} has the same numbers.",
                flush=True,
            )
        else:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(folder / _SCALARS), purge_step=step)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Note the values of a step."""
        self._rows.append({"step": step, **values})
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def write(self) -> None:
        """Write all noted values to disk."""
        text = io.StringIO()
        if self._rows:
            table = csv.DictWriter(text, list(self._rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(self._rows)
        write_atomically(self._path, text.getvalue().encode(), overwrite=True)
        if self._writer is not None:
            self._writer.flush()


def read(folder: Path) -> list[dict[str, float]]:
    """The rows of a table that a `Journal` wrote, with exact numbers."""
    with (folder / HISTORY).open(encoding="utf-8", newline="") as file:
        return [
            {name: int(value) if name == "step" else float(value) for name, value in row.items()}
            for row in csv.DictReader(file)
        ]
