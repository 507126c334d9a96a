"""Fits and their uncertainty: from observations to the three approaches' estimates. numpy and scipy, no torch."""
