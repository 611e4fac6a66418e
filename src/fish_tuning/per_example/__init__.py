"""The gradient of each example, in one backward pass."""
