"""A classifier of handwritten digits, trained in PyTorch and carried to Keras and Flax; see `__main__.py`."""
