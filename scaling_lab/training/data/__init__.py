"""Training data: the order of windows, and the feeds that bring their tokens to the device."""
