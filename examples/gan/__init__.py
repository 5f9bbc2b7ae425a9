"""What the three SAGAN programs share: digits, files, pictures, the loop and a measure of quality; it imports no framework."""
