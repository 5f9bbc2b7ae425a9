"""Whether an answer is right: expectations, tolerances, comparison."""
