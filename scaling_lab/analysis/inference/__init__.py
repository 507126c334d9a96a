"""Uncertainty of an analysis: bootstrap, profiles, agreement, sensitivity, predictions, comparison of laws."""
