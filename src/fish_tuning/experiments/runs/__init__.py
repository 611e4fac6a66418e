"""Arms -> trained runs and their records."""
