"""What several test modules share: synthetic sweeps with a known law, tiny runs, corpora, processes, a W&B server."""
