"""Fixtures for tests of the kit. They make its toy backends importable, here and in other processes."""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def on_path(monkeypatch):
    """As if toy_backends were a package somebody has installed."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])))
    monkeypatch.syspath_prepend(HERE)
