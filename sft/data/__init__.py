"""From data files to token caches, and from token caches to the batches of each optimizer step."""
