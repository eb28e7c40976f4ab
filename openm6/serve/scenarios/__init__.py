"""Uses of a model as data: inputs, output, prompt and the tasks that must have been trained."""
