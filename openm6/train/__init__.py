"""The training loop, its callbacks, and the training tasks that bring a model and data to it."""
