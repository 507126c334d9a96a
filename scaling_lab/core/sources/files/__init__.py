"""Token files on disk: reading Parquet, checking shards."""
