"""Trackers as sinks: what a training run mirrors elsewhere. Imports core alone."""
