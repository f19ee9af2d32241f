"""The command line; each command is a module of ``s2shadow.commands``.

Exit codes: 0 done, 1 a walk ended in a fault or two maps differ, 2 usage or bad input (one line on stderr), 130
interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from s2shadow.commands import (
    diff,
    dump,
    replay,
    storm,
    sweep,
    tlbi,
    walk,
)
from s2shadow.commands.common import (
    EXIT_BROKEN_PIPE,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_USAGE,
    Parser,
    UsageError,
    abandon_stdout,
    error_text,
)

# in the order in which --help lists them
COMMANDS = (
    storm,
    replay,
    walk,
    dump,
    diff,
    tlbi,
    sweep,
)


def main(argv: Sequence[str] | None = None) -> int:
    if sys.stdout is None:                  # closed, as by >&-
        return complain("stdout is closed")
    try:
        replace_closed()
        return dispatch(sys.argv[1:] if argv is None else check_arguments(argv))
    except UsageError as error:
        return complain(str(error))
    except BrokenPipeError:
        abandon_stdout()
        return EXIT_BROKEN_PIPE
    except OSError as error:        # of a path that cannot even be looked at
        return complain(f"cannot read {error.filename}: {error_text(error)}" if error.filename else error_text(error))
    except MemoryError as error:
        return complain(f"out of memory: {error}" if str(error) else "out of memory")
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def check_arguments(argv: Sequence[str]) -> list[str]:
    """Of a caller in Python: what no system could have passed is no name of a file either."""
    for argument in argv:
        try:
            if b"\0" not in os.fsencode(argument):
                continue
        except UnicodeEncodeError:
            pass
        raise UsageError(f"{argument!r} is no argument that a system could pass")
    return list(argv)


def replace_closed() -> None:
    """A closed stdin is an empty one; what is written to a closed stderr is lost, and does not go elsewhere."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")


def dispatch(argv: list[str]) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.version:
        from importlib.metadata import version

        print(f"s2shadow {version('s2shadow')}")
        return EXIT_OK
    if options.cflags:
        from s2shadow.capi import get_include

        print(f"-I{get_include()}")
        return EXIT_OK
    if options.command is None:
        parser.print_help()
        return EXIT_OK
    command: Callable[[argparse.Namespace], int] = options.run
    return command(options)


def complain(message: str) -> int:
    if sys.stderr is not None:
        line = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in " ".join(message.split()))
        print(f"s2shadow: {line}", file=sys.stderr)
    return EXIT_USAGE


def make_parser() -> Parser:
    parser = Parser(prog="s2shadow", description="Shadow stage-2 page tables for arm64 nested virtualization.",
                    allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("--cflags", action="store_true",
                        help="print what a compiler needs to find s2shadow/s2shadow.h, and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS:
        command.add(commands)
    return parser
