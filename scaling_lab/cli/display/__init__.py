"""What the command line shows: the console, progress, summaries."""
