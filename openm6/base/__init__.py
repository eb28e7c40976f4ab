"""Floor 1: errors, configuration, files, seeds and logs; nothing here imports torch."""
