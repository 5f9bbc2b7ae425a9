"""The two Flax layers as backends of the conformance kit."""
