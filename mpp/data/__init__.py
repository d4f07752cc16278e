"""Images: shards -> index -> order -> decode and crop -> batches."""
