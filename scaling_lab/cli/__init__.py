"""The command line. Configs are converted to typed settings here; no other package sees them."""
