"""The code blocks of a page in Markdown, and how they are run: as a reader would run them."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.M | re.S)

RUNNER = """
import json, os, sys, tempfile, traceback
failures = {}
for place, code in json.load(sys.stdin):
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            exec(compile(code, place, "exec"), {"__name__": "__main__"})
        except BaseException:
            failures[place] = traceback.format_exc()
        os.chdir(tempfile.gettempdir())
sys.stderr.flush()
print("\\n" + json.dumps(failures))
"""


class Block(NamedTuple):
    """A fenced block.

    Args:
        line: the number of its first line of code.
        language: the word after the fence.
        title: the rest of that line.
        code: the text.
    """

    line: int
    language: str
    title: str
    code: str


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, match.start()) + 2, match[1], match[2].strip(), match[3])
        for match in FENCE.finditer(text)
    ]


def failures(blocks: list[tuple[str, str]], **environment: str) -> dict[str, str]:
    """Run blocks in one process, each with names and a folder of its own; the tracebacks of those that fail, by place.

    Args:
        blocks: place and code of each.
        environment: variables that the process gets beside those of this one.
    """
    result = subprocess.run(
        [sys.executable, "-c", RUNNER],
        cwd=tempfile.gettempdir(),
        input=json.dumps(blocks),
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])
