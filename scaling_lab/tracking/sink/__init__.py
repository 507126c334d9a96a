"""What a training run writes to a tracker. Imports only core."""
