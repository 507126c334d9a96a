"""Designs: which model sizes are trained at which budgets or horizons. One design per file."""
