"""A classifier of handwritten digits, trained in PyTorch and moved to Keras and Flax; see `__main__.py`."""
