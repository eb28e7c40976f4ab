"""The backbone, its presets, and the import of published weights."""
