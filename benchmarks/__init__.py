"""Time and memory of the library and of other implementations of the same function; see `bench.py`."""
