"""Floor 5: which fields of a record are given, which is wanted, in what words, and how the answer is judged."""
