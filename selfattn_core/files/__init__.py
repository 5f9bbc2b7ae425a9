"""Reading input files up to a limit, and writing output files so that they are complete or absent."""
