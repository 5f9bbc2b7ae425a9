"""Files that users hand over and files that they ask for: read to a limit, written whole or not at all."""
