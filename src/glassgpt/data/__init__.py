"""Text to batches: sources (names to documents), download, prepare (documents to shards), tokens (shards to batches)."""
