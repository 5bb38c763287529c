"""Models of the paper's experiments, in plain torch."""
