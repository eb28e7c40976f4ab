"""Tasks: which fields of a record are the inputs, which is the target, the prompts and the metrics."""
