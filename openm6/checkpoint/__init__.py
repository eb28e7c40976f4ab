"""Floor 5: saving, finding and loading checkpoints; safetensors and JSON only, never pickle."""
