"""Measuring peak memory."""

import pytest

from selfattn_core.conformance.questions.peak_memory import PeakUnknownError, peak_growth


def test_nothing_is_called_where_memory_cannot_be_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "selfattn_core.conformance.questions.peak_memory._RESET", tmp_path / "absent" / "clear_refs"
    )
    called = []
    with pytest.raises(PeakUnknownError, match="which only Linux allows"):
        peak_growth(lambda: called.append(1))
    assert called == []


def test_the_former_home_still_leads_to_the_error():
    """Authors of backends were told to raise it from there."""
    with pytest.warns(DeprecationWarning, match=r"import PeakUnknownError from selfattn_core\.conformance"):
        from selfattn_core.conformance.memory import PeakUnknownError as Former
    assert Former is PeakUnknownError
