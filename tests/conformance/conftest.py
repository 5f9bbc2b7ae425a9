"""For tests of the kit: its toy backends can be imported, here and in processes of their own."""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def on_path(monkeypatch):
    """As if toy_backends were a package somebody has installed."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])))
    monkeypatch.syspath_prepend(HERE)
