"""Owns the console script: the table of commands, and how every way of ending becomes one line and an exit status.

Exit status: 0 done; 1 done, but runs failed or diverged; 2 the user can mend it; 70 our own bug;
74 a sweep's folder cannot be written (full, read-only); 75 told to go by the system (SIGTERM, SIGUSR1: the same command
goes on); 130 interrupted.
Importing this module imports nothing heavy: `scaling-lab --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from scaling_lab.cli.options.arguments import Arguments, parse
from scaling_lab.cli.table import COMMANDS
from scaling_lab.core.errors import DiskError, Preempted, UserError, unknown

EXIT_OK, EXIT_RUNS_FAILED, EXIT_USER, EXIT_BUG, EXIT_DISK = 0, 1, 2, 70, 74
EXIT_PREEMPTED, EXIT_INTERRUPTED = 75, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status. Tracebacks are shown only under SCALING_LAB_TRACEBACK=1."""
    arguments: Arguments | None = None
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        return _dispatch(arguments)
    except DiskError as error:
        return _fail(error, EXIT_DISK, str(error))
    except UserError as error:
        return _fail(error, EXIT_USER, str(error))
    except KeyboardInterrupt as error:
        return _interrupted(arguments, error)
    except BrokenPipeError:
        # The reader went away (`| head`): nothing is wrong, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except (
        PermissionError,
        FileNotFoundError,
        NotADirectoryError,
        IsADirectoryError,
        FileExistsError,
    ) as error:
        return _fail(error, EXIT_USER, _os_message(error))
    except OSError as error:
        return _fail(error, EXIT_RUNS_FAILED, _os_message(error))
    except Exception as error:
        text = f"internal error: {type(error).__name__}: {error}; SCALING_LAB_TRACEBACK=1 shows where. Please report it."
        return _fail(error, EXIT_BUG, text)


def _dispatch(arguments: Arguments) -> int:
    from scaling_lab.cli.options import help as helptext

    flags = arguments.flags
    if "version" in flags:
        print(f"scaling-lab {version()}")
        return EXIT_OK
    if arguments.command is None:
        if flags - {"help"}:
            raise UserError(f"which command? `scaling-lab --help` lists them: {', '.join(COMMANDS)}.")
        print(helptext.overview())
        return EXIT_OK
    if arguments.command not in COMMANDS:
        raise unknown("command", arguments.command, COMMANDS)
    entry = COMMANDS[arguments.command]
    if "help" in flags:
        print(helptext.command_help(entry, arguments))
        return EXIT_OK
    refused = flags - entry.flags - {"quiet", "verbose"}
    if refused:
        who = ", ".join(name for name, other in COMMANDS.items() if refused & other.flags)
        raise UserError(f"`{entry.name}` does not take --{min(refused)}: only {who} can use it.")
    return entry.load().run(arguments)


def version() -> str:
    """The installed version."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("scaling-lab")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown (not installed)"


def _fail(error: BaseException, status: int, message: str) -> int:
    if os.environ.get("SCALING_LAB_TRACEBACK", "") not in ("", "0"):
        import traceback

        traceback.print_exception(error)
    _say(f"error: {' '.join(message.split())}")
    return status


def _interrupted(arguments: Arguments | None, error: KeyboardInterrupt) -> int:
    """One line; the one who was interrupted may have said how to go on (`KeyboardInterrupt("...")`)."""
    hint = str(error)
    if not hint and arguments is not None and arguments.command:
        hint = "nothing that was finished is lost: the same command goes on."
    _say(f"interrupted: {hint}" if hint else "interrupted.")
    return EXIT_PREEMPTED if isinstance(error, Preempted) else EXIT_INTERRUPTED


def _os_message(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}."


def _say(text: str) -> None:
    sys.stdout.flush()
    # File names may hold bytes that the terminal's encoding lacks.
    sys.stderr.write(text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
