"""Floor 4: text, image, sound and numbers: raw input to tokens or codes, embedding, loss, and back to raw."""
