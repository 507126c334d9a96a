"""Fitting a law: objective, global search, batched minimizer, status, profile intervals."""
