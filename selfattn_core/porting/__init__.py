"""Weights in from other people's checkpoints, and out to them, exactly or with a refusal that explains."""
