"""Judging answers: expected values, tolerances and comparison."""
