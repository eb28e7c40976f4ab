"""Floor 5: which fields of a record are the inputs, which is the target, in what words, and by which metrics."""
