"""Experiment trackers: one tracked run per run of a sweep."""
