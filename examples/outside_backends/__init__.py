"""Two implementations of the layer that share no code with this library, as backends of the conformance kit."""
