"""The corpus of the shipped model: images, audio, texts, tables and series out of published packages."""
