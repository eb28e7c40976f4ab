"""Joules: counters where the machine has them, a declared estimate where it has none."""
