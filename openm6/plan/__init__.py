"""What a run will take before it starts: bytes, seconds, joules; without torch."""
