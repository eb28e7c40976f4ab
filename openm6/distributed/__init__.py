"""Many processes on one model: collectives over ranks, meshes, expert parallelism, worker pools."""
