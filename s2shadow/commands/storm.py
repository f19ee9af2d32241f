"""``s2shadow storm``: what MMU-notifier events cost a nested VM, per teardown policy."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from s2shadow.commands.common import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    UsageError,
    add_outputs,
    check_outputs,
    fraction,
    number,
    progress_bar,
    seconds,
    text_stream,
    write_output,
)
from s2shadow.constants import TEARDOWNS

SYNTHETIC_ONLY = ("pages", "aliases", "block_mix")


def add(commands: Any) -> None:
    storm = commands.add_parser(
        "storm", help="measure what MMU-notifier events cost a nested VM, per teardown policy", allow_abbrev=False,
        description="Builds the shadows of several L2s, takes host pages away one event at a time, and shows what "
                    "teardown and refaults cost under each policy. Runs on a capture shipped with the package if "
                    "no other is named.")
    storm.set_defaults(run=run)
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
                        help=f"policies, in this order: {', '.join(TEARDOWNS)} (default: all but interval-map)")
    events.add_argument("--tlbi", choices=("exact", "kvm72"),
                        help="extent of L1's TLBIs: the architecture's or Linux 7.2's (default exact)")
    events.add_argument("--seed", type=number(0), metavar="S", help="seed of the events and of the layout (default 1)")
    events.add_argument("--write", action="store_true", help="touch by writing (default: reading)")
    events.add_argument("--seconds", type=seconds, metavar="T",
                        help="time for each policy other than the reverse map, at least 5 events (default 15)")
    add_outputs(storm)
    storm.add_argument("--plot", metavar="FILE", help="picture (.png, .svg or .pdf)")


def policy_list(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in TEARDOWNS:
            raise argparse.ArgumentTypeError(f"no policy {name!r}; there are {', '.join(TEARDOWNS)}")
    return names


def run(options: argparse.Namespace) -> int:
    from s2shadow.report import emit, plot, storm_csv, storm_lines, write_json, write_text
    from s2shadow.storm import StormConfig, StormError, run

    check_outputs(options, options.capture)
    try:
        config = StormConfig(**storm_values(options))
        with progress_bar(sys.stderr) as progress:
            result = run(config, progress)
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
    if options.plot is not None and result["policies"] and not result["interrupted"]:
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
