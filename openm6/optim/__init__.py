"""Floor 2: update rules, learning-rate schedules and the list of optimizers."""
