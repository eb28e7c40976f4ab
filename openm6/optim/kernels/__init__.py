"""Triton kernels of the update rules, imported only where a GPU is to run them."""
