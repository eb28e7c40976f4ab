"""Served uses of a model, as data: what goes in, what comes out, in what words, and what must have been learned."""
