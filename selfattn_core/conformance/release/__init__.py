"""Tools for a release: writing golden vectors, and calibrating the limits."""
