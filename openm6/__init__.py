"""OpenM6: a sparse mixture-of-experts transformer with text, images, audio and numbers as inputs and outputs."""

__version__ = "0.1.0"
