"""Computations that several studies, or scripts, share."""
