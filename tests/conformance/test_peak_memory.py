"""Measuring peak memory."""

import pytest

from selfattn_core.conformance.questions.peak_memory import PeakUnknownError, peak_growth


def test_nothing_is_called_where_memory_cannot_be_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "selfattn_core.conformance.questions.peak_memory._RESET", tmp_path / "absent" / "clear_refs"
    )
    called = []
    with pytest.raises(PeakUnknownError, match="as on Linux"):
        peak_growth(lambda: called.append(1))
    assert called == []
