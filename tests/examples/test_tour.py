"""The notebook: every cell runs, and shows what is stored in it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TOUR = ROOT / "examples" / "tour.ipynb"


def shown(notebook: dict[str, Any]) -> list[str]:
    """What each output is, without numbers and spaces, which depend on the machine."""
    found = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            text = "".join(output.get("text") or output["data"]["text/plain"])
            text = re.sub(r"Worst: .*|machine \w+|\b[0-9a-f]{12}\b|\d[\d.,e+-]*", "", text)
            found.append(" ".join([*output.get("data", {}), *text.split()]))
    return found


def run(notebook: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The notebook with what its cells show now."""
    path = folder / "tour.ipynb"
    path.write_text(json.dumps(notebook), encoding="utf-8")
    command = [sys.executable, "-m", "tests.examples.notebook", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def stored() -> dict[str, Any]:
    return json.loads(TOUR.read_text(encoding="utf-8"))


def test_every_cell_runs_and_shows_what_is_stored(stored, tmp_path):
    """If a text has changed, `python -m tests.examples.notebook examples/tour.ipynb` stores the new one."""
    before = shown(stored)
    assert len(before) >= 7
    assert sum(text.startswith("image/png") for text in before) == 1
    assert shown(run(stored, tmp_path)) == before


def test_a_stale_output_is_noticed(stored, tmp_path):
    stored["cells"] = [
        {
            "cell_type": "code",
            "source": ["print('new', 1)\n", "2 > 1"],
            "outputs": [{"text": ["old 1\n"]}, {"data": {"text/plain": ["True"]}}],
        }
    ]
    assert shown(stored) == ["old", "text/plain True"]
    assert shown(run(stored, tmp_path)) == ["new", "text/plain True"]


def test_no_path_of_a_machine_is_stored(stored):
    outputs = json.dumps([cell.get("outputs") for cell in stored["cells"]])
    assert not re.search(r"(?<![\w./])/(tmp|home|root|Users|work|usr|opt)\b|0x[0-9a-f]{6}|[A-Z]:\\", outputs)
