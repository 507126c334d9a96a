"""Running training: the loop, its members, sessions, checkpoints, curves, heartbeats and signals."""
