"""The layers of the transformer: attention, experts, norms, the key-value cache and their configs."""
