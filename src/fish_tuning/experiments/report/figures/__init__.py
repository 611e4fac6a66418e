"""Figures: interactive ones of a sweep, and pictures of masks and scores."""
