"""Files and folders: atomic writes, claims, the JSON form of frozen dataclasses, the run store."""
