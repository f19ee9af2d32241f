"""What the commands share: errors of one line, exit codes, argument types, outputs and progress.

Everything heavier than argparse is imported where it is used: ``--help`` loads every command.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

if TYPE_CHECKING:
    from s2shadow.capture import Capture, CapturedVM

EXIT_OK, EXIT_FAULT, EXIT_USAGE = 0, 1, 2
EXIT_DIFFERENT = 1
# what captures, traces and folders of Linux's files consist of
CAPTURE_FILES = ("registers.json", "tables.npz", "l1_tables.npz", "memslots.json", "checks.json", "trace.", "tlbi.csv",
                 "stage2_page_tables")
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141       # 128 + SIGINT, 128 + SIGPIPE, as a shell reports them


class UsageError(Exception):
    """What the user gave cannot be used; the text is the one line that is printed."""


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


# --- argument types ----------------------------------------------------------------------------------------------


def number(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text, 0)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value
    return parse


def fraction(text: str) -> float:
    value = real(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


def seconds(text: str) -> float:
    value = real(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text}")
    return value


def real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def parse_register(text: str, name: str, example: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        raise UsageError(f"{name} must be a number such as {example}, got {text!r}") from None
    if not 0 <= value < 1 << 64:
        raise UsageError(f"{name} must be between 0 and 2^64, got {text}")
    return value


def choose_vm(capture: Capture, wanted: int | None) -> CapturedVM:
    if wanted is None:
        return capture.vms[0]
    from s2shadow.storm import pick_vm

    try:
        vm: CapturedVM = pick_vm(capture.vms, wanted, capture.path)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return vm


# --- outputs -----------------------------------------------------------------------------------------------------


def add_outputs(parser: argparse.ArgumentParser) -> None:
    for name in ("json", "csv"):
        parser.add_argument(f"--{name}", nargs="?", const="-", metavar="FILE",
                            help=f"write {name.upper()} to FILE (- or nothing: stdout, instead of the text)")


def check_outputs(options: argparse.Namespace, *inputs: str | os.PathLike[str] | None, **more: str | None) -> None:
    """Refuse now what would fail after the work is done, or what would take the place of an input or of another output.
    ``more``: outputs beside the usual ones, by option."""
    from s2shadow.report import check_writable

    files = {"--json": options.json, "--csv": options.csv, "--plot": getattr(options, "plot", None)}
    check_different(files | {f"--{option}": file for option, file in more.items()}, inputs)
    if options.json == "-" and options.csv == "-":
        raise UsageError("--json and --csv cannot both go to stdout")
    if files["--plot"] is not None:
        check_plot(files["--plot"])
    for option, file in files.items():
        if file is None or (file == "-" and option != "--plot"):
            continue
        if not file:
            raise UsageError(f"{option} needs a file name")
        try:
            check_writable(file)
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot write {file}: {error_text(error)}") from None


def check_different(outputs: dict[str, str | None], inputs: Iterable[str | os.PathLike[str] | None]) -> None:
    by_file: dict[str, str] = {}
    for option, file in outputs.items():
        if not file or file == "-":
            continue
        at = os.path.realpath(file)
        if at in by_file:
            raise UsageError(f"{by_file[at]} and {option} must be different files")
        by_file[at] = option
        for name in inputs:
            if name is not None and os.fspath(name) not in ("", "-") and is_part(at, os.path.realpath(name)):
                raise UsageError(f"{option} {file} would take the place of what is read")


def is_part(file: str, source: str) -> bool:
    """Whether a file is an input, or one of those that make a capture."""
    if not os.path.isdir(source):
        return file == source or (os.path.isfile(file) and os.path.exists(source) and os.path.samefile(file, source))
    inside = os.path.commonpath((file, source)) == source
    return inside and os.path.exists(file) and os.path.basename(file).startswith(CAPTURE_FILES)


def check_plot(file: str) -> None:
    from importlib.util import find_spec

    from s2shadow.report import PLOT_FORMATS

    if Path(file).suffix.lower() not in PLOT_FORMATS:
        raise UsageError(f"cannot plot to {file}: the name must end in {', '.join(PLOT_FORMATS)}")
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib, which is not installed: pip install 's2shadow[plot]'")


def error_text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    return str(error)


def text_stream(options: argparse.Namespace) -> TextIO | None:
    """Where the readable text goes: not between data on stdout, and not into a log that wants only errors."""
    if "-" not in (options.json, options.csv):
        return sys.stdout
    from s2shadow.report import is_terminal

    return sys.stderr if is_terminal(sys.stderr) and not is_terminal(sys.stdout) else None


def write_output(write: Callable[[], None], file: str = "-") -> None:
    try:
        write()
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        if file != "-":
            print(f"s2shadow: interrupted: {file} was not written", file=sys.stderr)
        raise
    except OSError as error:
        if file == "-":
            abandon_stdout()
        raise UsageError(f"cannot write {'stdout' if file == '-' else file}: {error_text(error)}") from None


def abandon_stdout() -> None:
    """Its reader has gone or its disk is full: the interpreter's own flush at exit must not trip over it again."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):       # not a file at all
        pass


# --- progress ----------------------------------------------------------------------------------------------------


class Counter:
    """One line on a terminal that counts up, and is gone when the work is done."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.last = 0.0

    def __enter__(self) -> Callable[[str, float], None]:
        return self.show

    def __exit__(self, *exception: object) -> None:
        self.stream.write("\r\x1b[K")
        self.stream.flush()

    def show(self, policy: str, done: float) -> None:
        now = time.monotonic()
        if now - self.last >= 0.1 or done >= 1:
            self.last = now
            self.stream.write(f"\r\x1b[K{policy}  {done:4.0%}")
            self.stream.flush()


class Bar:
    """The same with rich: one bar per policy. Drawn only when told, never by a thread beside what is being timed."""

    def __init__(self, stream: TextIO):
        from rich.console import Console
        from rich.progress import Progress

        self.progress = Progress(console=Console(file=stream), transient=True, auto_refresh=False)
        self.tasks: dict[str, Any] = {}
        self.last = 0.0

    def __enter__(self) -> Callable[[str, float], None]:
        self.progress.start()
        return self.show

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def show(self, policy: str, done: float) -> None:
        if policy not in self.tasks:
            self.tasks[policy] = self.progress.add_task(policy, total=1.0)
        self.progress.update(self.tasks[policy], completed=done)
        now = time.monotonic()
        if now - self.last >= 0.1 or done >= 1:
            self.last = now
            self.progress.refresh()


class Silence:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        return None


def progress_bar(stream: TextIO, bar: Callable[[TextIO], Any] = Bar, plain: Callable[[TextIO], Any] = Counter) -> Any:
    """Only where somebody watches; ``plain`` where rich is not installed."""
    from s2shadow.report import is_terminal

    if not is_terminal(stream):
        return Silence()
    try:
        return bar(stream)
    except ImportError:
        return plain(stream)
