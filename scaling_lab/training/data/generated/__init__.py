"""Generated sources made on the device, one file a kind, token for token those of `core/sources`."""
