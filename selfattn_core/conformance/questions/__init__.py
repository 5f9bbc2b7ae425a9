"""The questions that the kit asks a backend."""
