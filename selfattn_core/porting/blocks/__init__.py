"""Which tensors of a file are one attention block, and what layer it is."""
