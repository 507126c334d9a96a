"""One run under way: the loop, members, checkpoints, curves, signals."""
