"""OpenM6: one sparse-expert transformer that takes in and gives out text, images, audio and numbers."""

__version__ = "0.1.0"
