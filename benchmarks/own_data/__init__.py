"""Benchmark `own-data`: a model trained by `data inspect` and `train` on data of many kinds, against simple methods."""

from benchmarks.own_data.command import bench_own_data

__all__ = ["bench_own_data"]
