"""Two implementations of the layer that share no code with this library, and conform."""
