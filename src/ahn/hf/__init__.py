"""What is done to a transformers model so that it has memories, and how it is undone."""
