"""Floor 4: many processes on one model: sums and gathers over ranks, meshes, expert exchange, streamed weights."""
