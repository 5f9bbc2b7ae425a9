"""Parsers of untrusted bytes. Every length is checked before it is used, and nothing is executed."""
