"""Dialects: how implementations name, store and use their tensors."""
