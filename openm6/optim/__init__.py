"""Update rules, learning-rate schedules and the list of optimizers."""
