"""Published scaling data packed with the project, and what the papers say about them."""
