"""Parsing and checking of options: from the text of a command line to typed values."""
