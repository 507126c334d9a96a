"""Recipes: batch, learning rate, betas, weight decay and warmup from a model size and a horizon. One recipe per file."""
