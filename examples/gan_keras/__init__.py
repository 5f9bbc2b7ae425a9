"""The generator of the GAN examples, served from a SavedModel that Keras exports; see the README and `__main__.py`."""
