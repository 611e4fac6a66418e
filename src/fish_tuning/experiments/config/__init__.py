"""YAML -> a checked experiment config."""
