"""Experiments: one YAML in, a fair comparison out."""
