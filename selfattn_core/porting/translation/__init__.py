"""Translates the tensors of a dialect to canonical parameters, and back."""
