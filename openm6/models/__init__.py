"""Floor 5: the backbone, its presets, and the import of published weights."""
