"""Floor 7: tasks through the decoder, metrics against baselines, bits gained, and the report."""
