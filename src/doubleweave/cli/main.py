"""The command line: each subcommand parses, calls one function and prints.

Errors are one line on stderr and exit code 2, mistakes of ours one line and exit code 70 (EX_SOFTWARE of sysexits.h);
Ctrl-C is exit code 130. `--traceback` shows where an error came from. With --json the last line of stdout is one
object.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from doubleweave.cli.cache import add_cache
from doubleweave.cli.compile import add_compile, add_doctor
from doubleweave.cli.inspect import add_inspect
from doubleweave.cli.options import EXIT_ERROR
from doubleweave.cli.predict import add_commands
from doubleweave.cli.run import add_bench, add_run, add_score
from doubleweave.errors import DoubleweaveError, first_line

EXIT_INTERRUPTED = 130
EXIT_UNEXPECTED = 70
_TRACEBACK = "--traceback"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    words = list(sys.argv[1:] if argv is None else argv)
    # Of every command, and also behind its name.
    shows_traceback = _TRACEBACK in words
    args = parser.parse_args([word for word in words if word != _TRACEBACK])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model's text may have letters a terminal has not
    try:
        command: Callable[[argparse.Namespace], None] = args.command
        command(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        # An interrupt that came through an exec of text (as dataclasses are made) stays noted in CPython, and
        # `python -m` then ends by the signal, whatever is returned; the next exec of text forgets it.
        exec("")
        print("\ndoubleweave: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) went away; that is no error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if shows_traceback:
            traceback.print_exc()
        return _fail(error)
    return 0


def _fail(error: Exception) -> int:
    """Print the error in one line; returns the exit code."""
    code = EXIT_ERROR
    if isinstance(error, DoubleweaveError):
        message = str(error)
    elif isinstance(error, MemoryError):
        message = "not enough memory; use a smaller model, a shorter prompt or --quantize 8da4w"
    elif isinstance(error, OSError):
        message = f"{error.filename or 'output'}: {error.strerror or error}"
    else:
        code = EXIT_UNEXPECTED
        first = first_line(error, "without a message")
        message = (
            f"unexpected {type(error).__name__}: {first}; please report it with the output of {_TRACEBACK}"
        )
    print(f"doubleweave: {message}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """argparse in one line: what was wrong and where help is."""

    def error(self, message: str) -> NoReturn:
        print(f"doubleweave: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(EXIT_ERROR)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="doubleweave",
        description="Compile a language model into one ExecuTorch program of static and dynamic segments, "
        "and run it as a pipeline.",
    )
    parser.add_argument(
        _TRACEBACK, action="store_true", help="show where an error came from; of every command"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    add_compile(commands)
    add_run(commands)
    add_inspect(commands)
    add_bench(commands)
    add_score(commands)
    add_commands(commands)
    add_cache(commands)
    add_doctor(commands)
    return parser
