"""The loss of each example: which one it is, and computing it from the logits."""
