"""Time and memory of the library beside everything else that computes the same function; see `bench.py`."""
