"""Saving, finding and loading checkpoints; safetensors and JSON only, never pickle."""
