"""Benchmarks: each prints one JSON object with the baseline beside; run from a checkout, not part of the package."""
