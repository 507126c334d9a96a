"""Token sources described without torch: name, vocabulary, fingerprint. One source a file; readers are in training/data."""
