"""Replacing foreign attention layers of a model by ours."""
