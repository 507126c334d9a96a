"""Model families described without torch: each counts its own parameters and FLOPs. One family a file."""
