"""The PyTorch layer as a backend of the conformance kit."""
