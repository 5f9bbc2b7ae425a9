"""Finds the attention blocks in the tensors of a file, and the layer that each block is."""
