"""Weights that live outside of the device: pinned host memory, streams, and the store through which blocks use them."""
