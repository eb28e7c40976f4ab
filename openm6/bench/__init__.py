"""Benchmarks: one file each, each prints one JSON object with the peer's figure beside ours."""
