"""From a dialect's tensors to canonical parameters, and back."""
