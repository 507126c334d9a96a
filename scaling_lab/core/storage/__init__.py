"""Files on disk: atomic writes, claims, JSON serialization of frozen dataclasses, the run store."""
