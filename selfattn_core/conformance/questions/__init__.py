"""What the kit asks of a backend."""
