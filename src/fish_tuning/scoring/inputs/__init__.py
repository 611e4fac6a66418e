"""Loaders and batches -> calls of a model."""
