"""Floor 8: the training loop, its callbacks, and the jobs that bring a model and data to it."""
