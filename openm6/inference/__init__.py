"""Inference: from a checkpoint and a prompt to text, images, audio and numbers."""
