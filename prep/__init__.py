"""vggt-prep: posed captures -> frames -> shards, once and offline."""
