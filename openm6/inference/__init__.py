"""Floor 6: from a checkpoint and a question to text, pictures, sound and numbers."""
