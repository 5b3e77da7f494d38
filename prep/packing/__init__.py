"""From frames to shards."""
