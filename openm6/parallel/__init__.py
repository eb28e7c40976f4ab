"""Floor 4: what crosses devices: gathered rows, exchanged experts, streamed weights."""
