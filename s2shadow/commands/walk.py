"""``s2shadow walk``: addresses translated through a capture's stage 2, level by level."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from s2shadow.commands.common import (
    EXIT_FAULT,
    EXIT_OK,
    UsageError,
    add_outputs,
    check_outputs,
    choose_vm,
    number,
    parse_register,
    text_stream,
    write_output,
)

if TYPE_CHECKING:
    from s2shadow.capture import Capture, CapturedVM


def add(commands: Any) -> None:
    walk = commands.add_parser(
        "walk", help="translate addresses through a capture's stage 2, level by level", allow_abbrev=False,
        description="Walks the stage-2 tables of a capture. Nothing is written: where hardware would set the access "
                    "flag, the output says so. Exit code 1 if any address ends in a fault.")
    walk.set_defaults(run=run)
    walk.add_argument("capture", metavar="CAPTURE", help="folder with tables.npz and registers.json")
    walk.add_argument("ipas", metavar="IPA", nargs="+", help="address, such as 0x80000000")
    walk.add_argument("--vm", type=number(0), metavar="N", help="VM by its number in the capture (default: the first)")
    walk.add_argument("--tables", choices=("auto", "l1", "host"), default="auto",
                      help="nested captures: L1's own tables or the host's (default auto: L1's)")
    walk.add_argument("--access", type=access_letters, default="r", metavar="rwx",
                      help="what the access does: any of r, w, x (default r)")
    walk.add_argument("--explain", action="store_true", help="show every level with the fields named")
    add_outputs(walk)


def access_letters(text: str) -> str:
    if not text or set(text) - set("rwx"):
        raise argparse.ArgumentTypeError(f"must be of r, w and x, got {text!r}")
    return text


def run(options: argparse.Namespace) -> int:
    from s2shadow.capture import CaptureError
    from s2shadow.memory import GuestMemory
    from s2shadow.report import config_line, emit, explain_lines, walk_line, write_json, write_text
    from s2shadow.walker import walk

    check_outputs(options, options.capture)
    ipas = [parse_register(text, "IPA", "0x80000000") for text in options.ipas]
    access = sum({"r": 1, "w": 2, "x": 4}[letter] for letter in set(options.access))
    mem = GuestMemory()
    try:
        capture = mem.load_tables(options.capture, which=options.tables)
    except CaptureError as error:
        raise UsageError(str(error)) from None
    vm = choose_vm(capture, options.vm)
    cfg = vm.config()
    walks = [walk(mem, cfg, ipa, access, update=False, trace=options.explain) for ipa in ipas]

    stream = text_stream(options)
    if stream is not None:
        from s2shadow.report import Line

        lines = [Line(config_line(cfg), "bold")] if options.explain else []
        for found in walks:
            lines += explain_lines(cfg, found) if options.explain else [walk_line(found)]
        write_output(lambda: emit(lines, stream))
    if options.json is not None:
        record = walk_json(options, capture, vm, walks)
        write_output(lambda: write_json(record, options.json), options.json)
    if options.csv is not None:
        from s2shadow.report import csv_text, walk_record

        write_output(lambda: write_text(csv_text([walk_record(found) for found in walks]), options.csv), options.csv)
    return EXIT_FAULT if any(found.status for found in walks) else EXIT_OK


def walk_json(options: argparse.Namespace, capture: Capture, vm: CapturedVM, walks: Sequence[Any]) -> dict[str, Any]:
    from s2shadow.report import step_record, walk_record

    records = []
    for found in walks:
        record = walk_record(found)
        if options.explain:
            record["levels"] = [step_record(step) for step in found.steps]
        records.append(record)
    return {"schema": 1, "capture": str(capture.path), "vm": vm.vm, "vmid": vm.vmid, "vttbr": f"{vm.vttbr:#x}",
            "vtcr": f"{vm.vtcr:#x}", "granule": vm.granule, "ipa_bits": vm.ipa_bits, "access": options.access,
            "walks": records}
