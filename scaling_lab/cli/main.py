"""The console script: dispatches commands, and turns every exception into one line and an exit status.

Exit status: 0 success; 1 success, but runs failed or diverged; 2 user error; 70 internal error; 74 the sweep's folder
cannot be written (full, read-only); 75 preempted (SIGTERM, SIGUSR1: the same command resumes); 130 interrupted.
Importing this module loads nothing heavy, so that `scaling-lab --help` is fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from scaling_lab.cli.options.arguments import Arguments, parse
from scaling_lab.cli.table import COMMANDS
from scaling_lab.core.errors import EXIT_REQUEUE, DiskError, Preempted, UserError, unknown

EXIT_OK, EXIT_RUNS_FAILED, EXIT_USER, EXIT_BUG, EXIT_DISK = 0, 1, 2, 70, 74
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status. Tracebacks are shown only with SCALING_LAB_TRACEBACK=1."""
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
        # The reader closed the pipe (`| head`), which is not an error.
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
    except ModuleNotFoundError as error:
        return _missing_module(arguments, error)
    except Exception as error:
        text = f"internal error: {type(error).__name__}: {error}. Please report it; SCALING_LAB_TRACEBACK=1 shows the traceback."
        return _fail(error, EXIT_BUG, text)


def _dispatch(arguments: Arguments) -> int:
    from scaling_lab.cli.options import help as helptext

    flags = arguments.flags
    if "version" in flags:
        print(f"scaling-lab {version()}")
        return EXIT_OK
    if arguments.command is None:
        if flags - {"help"}:
            raise UserError(f"no command was given. Choices: {', '.join(COMMANDS)}.")
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
        others = ", ".join(name for name, other in COMMANDS.items() if refused & other.flags)
        raise UserError(f"`{entry.name}` does not support --{min(refused)}. Commands that do: {others}.")
    return entry.load().run(arguments)


def version() -> str:
    """The installed version."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("scaling-lab")
    except PackageNotFoundError:  # running from a source tree
        return "unknown (not installed)"


def _fail(error: BaseException, status: int, message: str) -> int:
    if os.environ.get("SCALING_LAB_TRACEBACK", "") not in ("", "0"):
        import traceback

        traceback.print_exception(error)
    _say(f"error: {' '.join(message.split())}")
    return status


def _missing_module(arguments: Arguments | None, error: ModuleNotFoundError) -> int:
    """A dependency that is not installed is one line with the command that installs it; another module is a bug."""
    from scaling_lab.core.installation import missing, package_of, requirements

    package = package_of(error.name or "")
    known = requirements()
    if package not in known:
        return _fail(
            error,
            EXIT_BUG,
            f"internal error: {error}; SCALING_LAB_TRACEBACK=1 shows where. Please report it.",
        )
    command = "this" if arguments is None else f"`scaling-lab {arguments.command or ''}`"
    return _fail(error, EXIT_USER, str(missing(package, command, known[package]["extra"] or None)))


def _interrupted(arguments: Arguments | None, error: KeyboardInterrupt) -> int:
    """Print one line; the exception's message, if any, says how to resume."""
    hint = str(error)
    if not hint and arguments is not None and arguments.command:
        hint = "finished work is kept; run the same command again to resume."
    _say(f"interrupted: {hint}" if hint else "interrupted.")
    return EXIT_REQUEUE if isinstance(error, Preempted) else EXIT_INTERRUPTED


def _os_message(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}."


def _say(text: str) -> None:
    sys.stdout.flush()
    # File names may contain bytes that cannot be encoded.
    sys.stderr.write(text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
