"""Triton kernels, one file an operation, imported only where a GPU is to run them; each has its twin in plain torch."""
