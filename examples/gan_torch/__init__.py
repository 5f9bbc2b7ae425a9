"""A small SAGAN on real digits in PyTorch; see the README and `__main__.py`."""
