"""The generator of a GAN, served from a SavedModel that Keras exports; see `__main__.py`."""
