"""Tensor functions: fast implementations with hand-written adjoints, and their references."""
