"""Evaluation: metrics of decoded answers, baselines, information gain, and the report."""
