"""The GAN of `examples.gan_torch`, trained further in Flax from its checkpoint; see the README and `__main__.py`."""
