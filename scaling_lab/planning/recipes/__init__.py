"""Recipes: batch, learning rate, betas, weight decay and warm-up from a size and a horizon. One recipe a file."""
