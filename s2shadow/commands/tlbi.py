"""``s2shadow tlbi``: one TLBI in words."""

from __future__ import annotations

import argparse
from typing import Any

from s2shadow.commands.common import (
    EXIT_OK,
    UsageError,
    add_outputs,
    check_outputs,
    parse_register,
    text_stream,
    write_output,
)


def add(commands: Any) -> None:
    tlbi = commands.add_parser(
        "tlbi", help="say in words what a TLBI reaches, and what Linux 7.2 does for it", allow_abbrev=False,
        description="Decodes one TLBI of L1: what its operand names, which shadow leaves it drops, and where Linux 7.2 "
                    "drops more.")
    tlbi.set_defaults(run=run)
    tlbi.add_argument("op", metavar="OP", help="name, such as RIPAS2E1IS, or 32-bit instruction word")
    tlbi.add_argument("xt", metavar="XT", nargs="?", help="operand (default: 0)")
    tlbi.add_argument("--vtcr", metavar="V", help="VTCR_EL2 that L1 had: granule, input size, DS (default: 48 bits, "
                                                  "any granule)")
    add_outputs(tlbi)


def run(options: argparse.Namespace) -> int:
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
