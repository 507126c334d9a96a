"""Token files on disk: reading Parquet, verifying shards."""
