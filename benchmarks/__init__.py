"""Benchmarks. Each prints one JSON object with its baseline. They run from a checkout and are not installed."""
