"""The training engine: the only zone that imports torch. It meets the analysis in the run records alone."""
