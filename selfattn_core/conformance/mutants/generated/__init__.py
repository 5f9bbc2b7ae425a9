"""Mutants that rules derive from the source of the definition and of adapters."""
