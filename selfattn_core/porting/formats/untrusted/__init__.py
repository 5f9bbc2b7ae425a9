"""Parsers of bytes that nobody vouches for: every length is checked before it is used, and nothing is executed."""
