"""``s2shadow replay``: a recorded event stream under each teardown policy."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from s2shadow.commands.common import (
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_OK,
    UsageError,
    add_outputs,
    check_outputs,
    error_text,
    number,
    progress_bar,
    text_stream,
    write_output,
)
from s2shadow.commands.storm import policy_list


def add(commands: Any) -> None:
    replay = commands.add_parser(
        "replay", help="replay a recorded event stream, per teardown policy", allow_abbrev=False,
        description="Drives the engine with the events of a trace (ftrace, trace-cmd report or perf script text, or a "
                    "CSV of TLBIs) and shows what each teardown policy would have done: faults served, those that only "
                    "over-invalidation caused, and what each host change cost. TRACE may be a capture folder: its "
                    "tables, memory slots and counts are found beside it, and the replay is checked against them. "
                    "Exit code 1 if it differs.")
    replay.set_defaults(run=run)
    replay.add_argument("trace", metavar="TRACE", help="capture folder, or a file (- is stdin; .gz and .xz are read)")
    source = replay.add_argument_group("the traced machine")
    source.add_argument("--role", choices=("l1", "l0"),
                        help="what the traced Linux is: L1, or L0 of a guest hypervisor (default: as the trace shows)")
    source.add_argument("--memory", metavar="CAPTURE", help="snapshot folder whose tables L1 has when the trace begins")
    source.add_argument("--memslot", action="append", type=memslot, metavar="gpa=,hva=,size=",
                        help="memory slot of the VM, for MMU notifiers (may be repeated)")
    source.add_argument("--vcpus", type=number(1), metavar="N", help="CPUs of L1 (default: as the trace shows)")
    engine = replay.add_argument_group("engine")
    engine.add_argument("--teardown", action="extend", nargs="+", type=policy_list, metavar="POLICY",
                        help="policies, in this order (default: all)")
    engine.add_argument("--tlbi", choices=("exact", "kvm72"),
                        help="extent of L1's TLBIs: the architecture's or Linux 7.2's (default exact)")
    engine.add_argument("--contexts", type=number(1), metavar="K", help="shadow contexts (default: 2 per vCPU)")
    add_outputs(replay)
    replay.add_argument("--plot", metavar="FILE", help="picture (.png, .svg or .pdf)")
    replay.add_argument("--report", metavar="FILE", help="page with everything (.html)")


def memslot(text: str) -> Any:
    from s2shadow.memslots import parse_memslot

    try:
        return parse_memslot(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(options: argparse.Namespace) -> int:
    from s2shadow.replay import ReplayConfig, run
    from s2shadow.replayreport import plot, replay_csv, replay_lines
    from s2shadow.report import emit, write_json, write_text

    check_outputs(options, options.trace, options.memory, report=options.report)
    check_report(options.report)
    try:
        config = ReplayConfig(**replay_values(options))
        with progress_bar(sys.stderr) as progress:
            result = run(config, progress)
    except (ValueError, OSError) as error:
        raise UsageError(error_text(error)) from None
    stream = text_stream(options)
    if stream is not None:
        hints = not (options.json or options.csv or options.plot or options.report)
        write_output(lambda: emit(replay_lines(result, hints), stream))
    if options.json is not None:
        write_output(lambda: write_json(result, options.json), options.json)
    if options.csv is not None:
        write_output(lambda: write_text(replay_csv(result), options.csv), options.csv)
    if options.plot is not None and len(result["timeline"]["seconds"]) > 1 and not result["interrupted"]:
        write_output(lambda: plot(result, options.plot), options.plot)
    if options.report is not None:
        from s2shadow.htmlreport import write_report

        write_output(lambda: write_report(result, options.report), options.report)
    if result["interrupted"]:
        return EXIT_INTERRUPTED
    return EXIT_OK if result["checks"]["passed"] else EXIT_FAULT


def check_report(file: str | None) -> None:
    """Refuse now what would fail after the work is done."""
    if file is None:
        return
    from s2shadow.report import check_writable

    if not file.lower().endswith((".html", ".htm")):
        raise UsageError(f"cannot write a page to {file or 'nothing'}: the name must end in .html")
    try:
        check_writable(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write {file}: {error_text(error)}") from None


def replay_values(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of ReplayConfig that were given; the rest keep their defaults, in one place."""
    names = ("trace", "role", "memory", "vcpus", "contexts", "tlbi")
    values = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.memslot is not None:
        values["memslots"] = tuple(options.memslot)
    if options.teardown is not None:
        policies = [name for names in options.teardown for name in names]
        if not policies:
            raise UsageError("--teardown names no policy")
        values["teardown"] = tuple(dict.fromkeys(policies))
    return values
