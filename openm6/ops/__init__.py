"""Floor 2: tensor functions; fast kernels and their naive twins."""
