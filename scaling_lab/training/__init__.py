"""Training: the only package that imports torch. It shares nothing with the analysis but the run records."""
