"""The commands, one per file with `run(arguments) -> int` (the exit status), imported only when used."""
