"""Running backends in separate processes."""
