"""Text to batches: sources, preparation of token shards, datasets, batches."""
