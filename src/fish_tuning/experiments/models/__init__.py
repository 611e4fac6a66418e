"""From a config to the base model and its tokenizer."""
