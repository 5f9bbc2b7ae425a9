"""The names that the runner refuses or reports as missing before it starts a process."""

import dataclasses
import time

import pytest

from selfattn_core.conformance.backends import KNOWN
from selfattn_core.conformance.execution.runner import run_backend
from selfattn_core.conformance.report import as_data, as_table


def test_a_name_that_is_no_backend():
    with pytest.raises(ValueError, match="expected one of torch, keras-tensorflow"):
        run_backend("tensorfow")
    with pytest.raises(ValueError, match="or module:object for your own"):
        run_backend("torch:")


def test_a_missing_backend_is_told_at_once(monkeypatch):
    missing = dataclasses.replace(KNOWN["torch"], requires=("no_such_framework",))
    monkeypatch.setitem(KNOWN, "torch", missing)
    began = time.monotonic()
    report = run_backend("torch")
    assert time.monotonic() - began < 1
    assert report.missing == ("no_such_framework",)
    assert not report.passed
    assert "no_such_framework not installed: pip install 'selfattn[torch]'" in as_table(as_data([report]))
