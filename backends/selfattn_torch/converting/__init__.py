"""Our layer in the place of foreign ones in a model."""
