"""Dialects: what published implementations call their tensors, and what they compute with them."""
