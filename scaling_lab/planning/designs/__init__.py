"""Designs: which sizes are trained at which budgets or horizons. One design a file."""
