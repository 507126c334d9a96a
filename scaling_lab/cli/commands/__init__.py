"""One command a file, each with `run(request) -> int`, the exit status. Imported only when the command is given."""
