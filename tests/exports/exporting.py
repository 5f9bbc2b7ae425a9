"""The process that exports: one exporter, some forms of the layer, a line of JSON about each.

    python -m tests.exports.exporting EXPORTER FOLDER FORM …

Where an exporter takes the process along, the lines end, and the sweep goes on behind that form in another process.
"""

import importlib
import json
import sys
from pathlib import Path

from tests.exports.cells import EXPORTERS, FORMS

__all__ = ["SAID", "artifact"]

SAID = "said.jsonl"
_LONGEST = 400


def artifact(folder: Path, form: str, suffix: str) -> Path:
    """Where the file of a form lies; a SavedModel, which has no suffix, is a folder.

    Args:
        folder: of the exporter.
        form: its words.
        suffix: of the exporter.
    """
    return folder / f"{form}{suffix}"


def reason(error: BaseException) -> str:
    """What a tool says, in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:_LONGEST] or 'no message'}"


def main(name: str, folder: Path, words: list[str]) -> None:
    """Export the forms one after the other."""
    (exporter,) = [each for each in EXPORTERS if each.name == name]
    forms = {form.words: form for form in FORMS}
    with (folder / SAID).open("a", encoding="utf-8") as stream:
        for word in words:
            try:
                export = getattr(importlib.import_module(f"tests.exports.{exporter.source}"), name)
                export(forms[word], artifact(folder, word, exporter.suffix))
                problem = ""
            # Exporters raise what they like, and what they raise is the answer.
            except Exception as error:
                problem = reason(error)
            stream.write(f"{json.dumps({'form': word, 'problem': problem})}\n")
            stream.flush()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
