"""Layer 40: text, image, audio and numbers: raw input to tokens or codes, embedding, loss, and back to raw."""
