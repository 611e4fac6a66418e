"""Tensors of which some entries are trained: where they lie, and how values and tensors agree."""
