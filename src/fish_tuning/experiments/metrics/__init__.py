"""What runs are measured by: the names of the metrics, and how each is computed."""
