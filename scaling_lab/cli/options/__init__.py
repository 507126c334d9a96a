"""From the text of a command line to checked options."""
