"""The command line: ``s2shadow storm``, ``s2shadow walk`` and ``s2shadow tlbi``.

Exit codes: 0 done, 1 a walk ended in a fault, 2 usage or bad input (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

if TYPE_CHECKING:
    from s2shadow.capture import Capture, CapturedVM

EXIT_OK, EXIT_FAULT, EXIT_USAGE = 0, 1, 2
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141       # 128 + SIGINT, 128 + SIGPIPE, as a shell reports them

SYNTHETIC_ONLY = ("pages", "aliases", "block_mix")


class UsageError(Exception):
    """What the user gave cannot be used; the text is the one line that is printed."""


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return dispatch(sys.argv[1:] if argv is None else list(argv))
    except UsageError as error:
        return complain(str(error))
    except BrokenPipeError:
        abandon_stdout()
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def dispatch(argv: list[str]) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.version:
        from importlib.metadata import version

        print(f"s2shadow {version('s2shadow')}")
        return EXIT_OK
    if options.command is None:
        parser.print_help()
        return EXIT_OK
    command: Callable[[argparse.Namespace], int] = options.run
    return command(options)


def abandon_stdout() -> None:
    """Its reader has gone or its disk is full: the interpreter's own flush at exit must not trip over it again."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):       # not a file at all
        pass


def complain(message: str) -> int:
    print(f"s2shadow: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_USAGE


# --- options ---------------------------------------------------------------------------------------------------


def make_parser() -> Parser:
    parser = Parser(prog="s2shadow", description="Shadow stage-2 page tables for arm64 nested virtualization.",
                    allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    add_storm(commands)
    add_walk(commands)
    add_tlbi(commands)
    return parser


def add_storm(commands: Any) -> None:
    storm = commands.add_parser(
        "storm", help="measure what MMU-notifier events cost a nested VM, per teardown policy", allow_abbrev=False,
        description="Builds the shadows of several L2s, takes host pages away one event at a time, and shows what "
                    "teardown and refaults cost under each policy. Runs on a capture shipped with the package if "
                    "no other is named.")
    storm.set_defaults(run=run_storm)
    source = storm.add_argument_group("tables")
    source.add_argument("--capture", metavar="SNAPSHOT", help="folder with tables.npz and registers.json")
    source.add_argument("--vm", type=number(0), metavar="N", help="VM of the capture (default: the largest)")
    source.add_argument("--synthetic", action="store_true", help="generate the tables")
    source.add_argument("--contexts", type=number(1), metavar="K", help="nested VMs (default 4)")
    source.add_argument("--pages", type=number(1), metavar="M",
                        help="synthetic: canonical 4K pages per context (default 65536)")
    source.add_argument("--aliases", type=number(1), metavar="A",
                        help="synthetic: nested IPAs that show each page (default 1)")
    source.add_argument("--block-mix", type=fraction, metavar="F",
                        help="synthetic: fraction of the bytes in 2 MiB blocks (default 0)")
    events = storm.add_argument_group("events")
    events.add_argument("--events", type=number(1), metavar="N", help="events under the reverse map (default 10000)")
    events.add_argument("--event-pages", type=number(1), metavar="P", help="pages per event (default 1)")
    events.add_argument("--teardown", action="extend", nargs="+", type=policy_list, metavar="POLICY",
                        help="policies, in this order: reverse-map, blow-away, blow-away-lean (default: all)")
    events.add_argument("--tlbi", choices=("exact", "kvm72"),
                        help="extent of L1's TLBIs: the architecture's or Linux 7.2's (default exact)")
    events.add_argument("--seed", type=number(0), metavar="S", help="seed of the events and of the layout (default 1)")
    events.add_argument("--write", action="store_true", help="touch by writing (default: reading)")
    events.add_argument("--seconds", type=seconds, metavar="T",
                        help="time for each policy other than the reverse map, at least 5 events (default 15)")
    add_outputs(storm)
    storm.add_argument("--plot", metavar="FILE", help="picture (.png, .svg or .pdf)")


def add_walk(commands: Any) -> None:
    walk = commands.add_parser(
        "walk", help="translate addresses through a capture's stage 2, level by level", allow_abbrev=False,
        description="Walks the stage-2 tables of a capture. Nothing is written: where hardware would set the access "
                    "flag, the output says so. Exit code 1 if any address ends in a fault.")
    walk.set_defaults(run=run_walk)
    walk.add_argument("capture", metavar="CAPTURE", help="folder with tables.npz and registers.json")
    walk.add_argument("ipas", metavar="IPA", nargs="+", help="address, such as 0x80000000")
    walk.add_argument("--vm", type=number(0), metavar="N", help="VM by its number in the capture (default: the first)")
    walk.add_argument("--tables", choices=("auto", "l1", "host"), default="auto",
                      help="nested captures: L1's own tables or the host's (default auto: L1's)")
    walk.add_argument("--access", type=access_letters, default="r", metavar="rwx",
                      help="what the access does: any of r, w, x (default r)")
    walk.add_argument("--explain", action="store_true", help="show every level with the fields named")
    add_outputs(walk)


def add_tlbi(commands: Any) -> None:
    tlbi = commands.add_parser(
        "tlbi", help="say in words what a TLBI reaches, and what Linux 7.2 does for it", allow_abbrev=False,
        description="Decodes one TLBI of L1: what its operand names, which shadow leaves it drops, and where Linux 7.2 "
                    "drops more.")
    tlbi.set_defaults(run=run_tlbi)
    tlbi.add_argument("op", metavar="OP", help="name, such as RIPAS2E1IS, or 32-bit instruction word")
    tlbi.add_argument("xt", metavar="XT", nargs="?", help="operand (default: 0)")
    tlbi.add_argument("--vtcr", metavar="V", help="VTCR_EL2 that L1 had: granule, input size, DS (default: 48 bits, "
                                                  "any granule)")
    add_outputs(tlbi)


def add_outputs(parser: argparse.ArgumentParser) -> None:
    for name in ("json", "csv"):
        parser.add_argument(f"--{name}", nargs="?", const="-", metavar="FILE",
                            help=f"write {name.upper()} to FILE (- or nothing: stdout, instead of the text)")


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


def policy_list(text: str) -> list[str]:
    from s2shadow.storm import POLICIES

    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in POLICIES:
            raise argparse.ArgumentTypeError(f"no policy {name!r}; there are {', '.join(POLICIES)}")
    return names


def access_letters(text: str) -> str:
    if not text or set(text) - set("rwx"):
        raise argparse.ArgumentTypeError(f"must be of r, w and x, got {text!r}")
    return text


def check_outputs(options: argparse.Namespace) -> None:
    """Refuse now what would fail after the work is done."""
    from s2shadow.report import check_writable

    files = {"--json": options.json, "--csv": options.csv, "--plot": getattr(options, "plot", None)}
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
    except OSError as error:
        if file == "-":
            abandon_stdout()
        raise UsageError(f"cannot write {'stdout' if file == '-' else file}: {error_text(error)}") from None


# --- storm -----------------------------------------------------------------------------------------------------


def run_storm(options: argparse.Namespace) -> int:
    from s2shadow.report import emit, plot, storm_csv, storm_lines, write_json, write_text
    from s2shadow.storm import StormConfig, StormError, run

    check_outputs(options)
    try:
        config = StormConfig(**storm_values(options))
        with progress_bar(sys.stderr) as progress:
            result = run(config, progress)
    except MemoryError as error:
        raise UsageError(f"out of memory: {error}" if str(error) else "out of memory") from None
    except (ValueError, StormError) as error:
        raise UsageError(str(error)) from None
    stream = text_stream(options)
    if stream is not None:
        lines = storm_lines(result, hints=not (options.json or options.csv or options.plot))
        write_output(lambda: emit(lines, stream))
    if options.json is not None:
        write_output(lambda: write_json(result, options.json), options.json)
    if options.csv is not None:
        write_output(lambda: write_text(storm_csv(result), options.csv), options.csv)
    if options.plot is not None and result["policies"]:
        write_output(lambda: plot(result, options.plot), options.plot)
    return EXIT_INTERRUPTED if result["interrupted"] else EXIT_OK


def storm_values(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of StormConfig that were given; the rest keep their defaults, in one place."""
    if options.synthetic:
        for name in ("capture", "vm"):
            if getattr(options, name) is not None:
                raise UsageError(f"--{name} and --synthetic exclude each other")
    else:
        for name in SYNTHETIC_ONLY:
            if getattr(options, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} needs --synthetic")
    names = ("capture", "vm", "synthetic", "contexts", "pages", "aliases", "block_mix", "events", "event_pages", "tlbi",
             "seed", "write", "seconds")
    values = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.teardown is not None:
        policies = [name for names in options.teardown for name in names]
        if not policies:
            raise UsageError("--teardown names no policy")
        values["teardown"] = tuple(dict.fromkeys(policies))
    return values


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


def progress_bar(stream: TextIO) -> Any:
    """Only where somebody watches."""
    from s2shadow.report import is_terminal

    if not is_terminal(stream):
        return Silence()
    try:
        return Bar(stream)
    except ImportError:
        return Counter(stream)


# --- walk ------------------------------------------------------------------------------------------------------


def run_walk(options: argparse.Namespace) -> int:
    from s2shadow.capture import CaptureError
    from s2shadow.memory import GuestMemory
    from s2shadow.report import config_line, emit, explain_lines, walk_line, write_json, write_text
    from s2shadow.walker import walk

    check_outputs(options)
    ipas = [parse_register(text, "IPA", "0x80000000") for text in options.ipas]
    access = sum({"r": 1, "w": 2, "x": 4}[letter] for letter in set(options.access))
    mem = GuestMemory()
    try:
        capture = mem.load_tables(options.capture, which=options.tables)
    except CaptureError as error:
        raise UsageError(str(error)) from None
    vm = choose_vm(capture, options.vm)
    cfg = vm.config()
    walks = [walk(mem, cfg, ipa, access, update=False) for ipa in ipas]

    stream = text_stream(options)
    if stream is not None:
        from s2shadow.report import Line

        lines = [Line(config_line(cfg), "bold")] if options.explain else []
        for found in walks:
            lines += explain_lines(mem, cfg, found) if options.explain else [walk_line(found)]
        write_output(lambda: emit(lines, stream))
    if options.json is not None:
        record = walk_json(options, capture, vm, mem, cfg, walks)
        write_output(lambda: write_json(record, options.json), options.json)
    if options.csv is not None:
        from s2shadow.report import csv_text, walk_record

        write_output(lambda: write_text(csv_text([walk_record(found) for found in walks]), options.csv), options.csv)
    return EXIT_FAULT if any(found.status for found in walks) else EXIT_OK


def walk_json(options: argparse.Namespace, capture: Capture, vm: CapturedVM, mem: Any, cfg: Any,
              walks: Sequence[Any]) -> dict[str, Any]:
    from s2shadow.report import explain, step_record, walk_record

    records = []
    for found in walks:
        record = walk_record(found)
        if options.explain:
            record["levels"] = [step_record(step) for step in explain(mem, cfg, found)]
        records.append(record)
    return {"schema": 1, "capture": str(capture.path), "vm": vm.vm, "vmid": vm.vmid, "vttbr": f"{vm.vttbr:#x}",
            "vtcr": f"{vm.vtcr:#x}", "granule": vm.granule, "ipa_bits": vm.ipa_bits, "access": options.access,
            "walks": records}


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


# --- tlbi ------------------------------------------------------------------------------------------------------


def run_tlbi(options: argparse.Namespace) -> int:
    from s2shadow.report import Line, csv_text, emit, write_json, write_text
    from s2shadow.tlbiwords import describe, operation, record

    check_outputs(options)
    xt = None if options.xt is None else parse_register(options.xt, "XT", "0x0000400000080123")
    vtcr = None if options.vtcr is None else parse_register(options.vtcr, "--vtcr", "0x802d3558")
    try:
        found = describe(operation(options.op), xt, vtcr)
    except ValueError as error:
        raise UsageError(str(error)) from None
    stream = text_stream(options)
    if stream is not None:
        heading, *rest = found.lines
        write_output(lambda: emit([Line(heading, "bold"), *map(Line, rest)], stream))
    if options.json is not None:
        write_output(lambda: write_json({"schema": 1, **record(found), "words": found.lines}, options.json),
                     options.json)
    if options.csv is not None:
        write_output(lambda: write_text(csv_text([record(found)]), options.csv), options.csv)
    return EXIT_OK
