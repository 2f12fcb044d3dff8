"""Training a vocabulary, or changing an existing one: `python -m minillm vocab train|merge|prune|inspect`."""
