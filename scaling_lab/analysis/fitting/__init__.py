"""Fitting laws: objective, global search, batched minimizer, fit status, and profile intervals."""
