"""A config -> the base model and its tokenizer."""
