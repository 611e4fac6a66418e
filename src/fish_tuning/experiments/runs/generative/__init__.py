"""What only runs of language models do: generate texts, and evaluate before and after."""
