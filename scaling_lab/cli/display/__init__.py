"""Output of the command line: the console, progress, summaries."""
