"""Files on disk: input files are read up to a limit, output files are written whole or not at all."""
