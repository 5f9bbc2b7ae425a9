"""Every script about somebody else's library is on the page that lists them, and its head says what it has to."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "findings").glob("*.sh"))
HEAD = ("One would guess:", "What happens:", "What helps:", "Versions:", "Sources:", "Output seen")


def test_the_page_lists_every_script_and_no_other():
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    named = {
        cell.strip(" `") for line in page.splitlines() for cell in line.split("|") if cell.endswith(".sh` ")
    }
    assert SCRIPTS
    assert named == {script.name for script in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_head_of_a_script_says_what_it_has_to(script):
    text = script.read_text(encoding="utf-8")
    head = text.partition("set -euo pipefail")[0]
    missing = [part for part in HEAD if f"# {part}" not in head]
    assert not missing
    assert "selfattn_" not in text
