"""Code shared by several test modules: synthetic sweeps with a known law, tiny runs, corpora, processes, a W&B server."""
