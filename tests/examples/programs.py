"""Runs of one program in one process: each argument is the command line of a run, its words separated by spaces."""

import importlib
import sys

program = importlib.import_module(f"examples.{sys.argv[1]}")
# Keras adds the epsilon of Adam at another place than the others. This small, it does not count.
program.EPSILON = 1e-12
for line in sys.argv[2:]:
    sys.argv[1:] = line.split()
    if code := program.main():
        sys.exit(code)
