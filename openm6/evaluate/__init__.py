"""Floor 7: tasks through the decoder, metrics against baselines, information gain, and the report."""
