"""``s2shadow dump``: the stage-2 map of a capture as ranges."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from s2shadow.commands.common import (
    EXIT_OK,
    UsageError,
    add_outputs,
    check_outputs,
    error_text,
    number,
    text_stream,
    write_output,
)

if TYPE_CHECKING:
    from s2shadow.capturedtables import Table
    from s2shadow.ranges import Rows
    from s2shadow.report import Line

HEADINGS = ("IPA", "size", "level", "entries", "access", "AF", "PA", "memory")


def add(commands: Any) -> None:
    dump = commands.add_parser(
        "dump", help="print a capture's stage-2 map as ranges, as Linux prints it if wanted", allow_abbrev=False,
        description="Prints a stage-2 table of a capture as ranges of addresses: all of the IPA space, what is not "
                    "mapped too. Nothing is written to the tables. With --format kernel to the letter what Linux 7.2 "
                    "prints in stage2_page_tables (debugfs), which leaves out the last range.")
    dump.set_defaults(run=run)
    dump.add_argument("capture", metavar="CAPTURE", help="folder with tables.npz and registers.json")
    add_table_choice(dump)
    dump.add_argument("--format", choices=("table", "kernel", "json"), default=None,
                      help="table (default), kernel, or json (the same as --json)")
    dump.add_argument("-o", "--output", metavar="DIR",
                      help="write the files that Linux has in the VM's debugfs folder: stage2_page_tables, ipa_range, "
                           "stage2_levels, and of a nested capture one file per shadow in nested/")
    add_outputs(dump)


def add_table_choice(parser: argparse.ArgumentParser) -> None:
    """Which table of a capture; for ``dump`` and ``diff``."""
    parser.add_argument("--vm", type=number(0), metavar="N",
                        help="VM by its number in the capture (default: the first)")
    parser.add_argument("--tables", choices=("auto", "l1", "host"), default="auto",
                        help="nested captures: where --vm looks, L1's own tables or the host's (default auto: L1's)")
    parser.add_argument("--host", action="store_true", help="nested captures: the host's own table for L1")
    parser.add_argument("--nested", type=number(0), metavar="N",
                        help="nested captures: shadow table N of the host, from 0")
    parser.add_argument("--engine", action="store_true",
                        help="nested captures: the shadow table (--nested, default 0) as the engine builds it from "
                             "L1's table and the host's")


def check_table_choice(options: argparse.Namespace) -> None:
    if options.host and (options.nested is not None or options.engine):
        raise UsageError(f"--host and {'--engine' if options.engine else '--nested'} exclude each other")
    if options.host or options.nested is not None or options.engine:
        if options.vm is not None:
            raise UsageError("--vm goes with the tables of VMs, not with --host, --nested and --engine")
        if options.tables != "auto":
            raise UsageError("--tables goes with the tables of VMs, not with --host, --nested and --engine")


def open_table(capture: str, options: argparse.Namespace, engine: bool) -> Table:
    from s2shadow.capture import CaptureError
    from s2shadow.capturedtables import engine_table, host_table, shadow_table, vm_table

    try:
        if options.host:
            return host_table(capture)
        if engine:
            return engine_table(capture, options.nested or 0)
        if options.nested is not None or options.engine:
            return shadow_table(capture, options.nested or 0)
        return vm_table(capture, options.vm, options.tables)
    except CaptureError as error:
        raise UsageError(str(error)) from None


def run(options: argparse.Namespace) -> int:
    from s2shadow.report import csv_text, emit, write_json, write_text

    check_table_choice(options)
    if options.format == "json" and options.json is None:
        options.json = "-"
    check_outputs(options, options.capture)
    if options.output == "":
        raise UsageError("-o needs the name of a folder")
    for name in ("json", "csv"):
        if options.format == "kernel" and getattr(options, name) == "-":
            raise UsageError(f"--format kernel and --{name} cannot both go to stdout")
    if options.output is not None:
        return write_files(options)
    table = open_table(options.capture, options, options.engine)
    stream = text_stream(options)
    if options.format == "kernel":
        text = to_kernel(table, options.capture)
        write_output(lambda: write_text(text, "-"))
    elif stream is not None:
        lines = table_lines(options.capture, table)
        write_output(lambda: emit(lines, stream))
    if options.json is not None:
        write_output(lambda: write_json(table_json(options.capture, table), options.json), options.json)
    if options.csv is not None:
        from s2shadow.ranges import records

        write_output(lambda: write_text(csv_text(records(table.rows)), options.csv), options.csv)
    return EXIT_OK


def to_kernel(table: Table, capture: str) -> str:
    from s2shadow.kerneltext import kernel_text
    from s2shadow.ranges import DumpError

    try:
        return kernel_text(table.rows)
    except DumpError as error:
        raise UsageError(f"{capture}: {table.label}: {error}") from None


def table_json(capture: str, table: Table) -> dict[str, Any]:
    from s2shadow.ranges import records

    cfg = table.cfg
    return {"schema": 1, "capture": capture, "table": table.label, "vmid": cfg.vmid, "vttbr": f"{cfg.vttbr:#x}",
            "vtcr": f"{cfg.vtcr:#x}", "granule": cfg.granule, "ipa_bits": cfg.ia_bits, "start_level": cfg.start_level,
            "ranges": records(table.rows)}


# --- text ------------------------------------------------------------------------------------------------------


def table_lines(capture: str, table: Table) -> list[Line]:
    from s2shadow.report import Line, columns, config_line

    heading, *body = columns([HEADINGS, *(cells(row, table) for row in table.rows)], left=(0, 4, 7))
    mapped = table.rows["perm"] != 0
    return [Line(f"{capture}: {table.label}"), Line(config_line(table.cfg)), Line(), Line(heading, "bold"),
            *(Line(text, "" if live else "dim") for text, live in zip(body, mapped.tolist(), strict=True)), Line(),
            Line(summary(table.rows))]


def cells(row: Any, table: Table) -> tuple[str, ...]:
    from s2shadow.constants import perm_text, size_text
    from s2shadow.ranges import AF, STATES, State
    from s2shadow.report import SHAREABILITY, memattr_text

    start, end, pa, size, attrs, level, state, perm, memattr, sh = row.tolist()
    ipa = f"0x{start:016x}-0x{end:016x}"
    if state != State.MAPPED:
        what = "not mapped" if state == State.INVALID else f"fault: {STATES[state]}"
        return (ipa, size_text(end - start), str(level), "", what, "", "", "")
    fwb = bool(table.cfg.features.fwb and table.cfg.hcr >> 46 & 1)
    return (ipa, size_text(end - start), str(level), f"{(end - start) // size:,}", perm_text(perm),
            "AF" if attrs & AF else "-", f"{pa:#x}", f"{memattr_text(memattr, fwb)}, {SHAREABILITY[sh]}")


def summary(rows: Rows) -> str:
    """``64,410 leaves of 4K: 252 MiB mapped in 9,100 ranges``."""
    import numpy as np

    from s2shadow.constants import size_text
    from s2shadow.ranges import State
    from s2shadow.report import bytes_text

    mapped = rows[rows["state"] == State.MAPPED]
    if not len(mapped):
        return "nothing is mapped"
    length = mapped["end"] - mapped["start"]
    leaves = [f"{int((length[mapped['size'] == size] // size).sum()):,} of {size_text(int(size))}"
              for size in np.unique(mapped["size"])]
    return (f"{bytes_text(int(length.sum()))} mapped in {len(mapped):,} ranges; leaves: {', '.join(leaves)}")


# --- the kernel's files ----------------------------------------------------------------------------------------


def write_files(options: argparse.Namespace) -> int:
    from s2shadow.report import Line, emit, write_folder

    if options.format in ("table", "json") or options.json is not None or options.csv is not None:
        raise UsageError("-o writes the kernel's files; other formats do not go with it")
    if options.host or options.nested is not None:
        raise UsageError(f"-o writes every table; {'--host' if options.host else '--nested'} does not go with it")
    files = kernel_files(options)
    try:
        write_folder(options.output, files)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write {options.output}: {error_text(error)}") from None
    write_output(lambda: emit([Line(f"{options.output}/{name}") for name in files], sys.stdout))
    return EXIT_OK


def kernel_files(options: argparse.Namespace) -> dict[str, str]:
    """Name and text of every file in Linux's folder of the VM."""
    from s2shadow.capture import CaptureError
    from s2shadow.capturedtables import engine_table, host_table, shadow_count, shadow_table, vm_table

    folder = options.capture
    try:
        count = shadow_count(folder)
        if count and options.vm is not None:
            raise UsageError("-o writes every table of a nested capture; --vm does not go with it")
        if options.engine and not count:
            raise UsageError(f"--engine needs a nested capture, and no guest hypervisor ran in {folder}")
        canonical = host_table(folder) if count else vm_table(folder, options.vm, options.tables)
        shadows = [(engine_table if options.engine else shadow_table)(folder, i) for i in range(count)]
    except CaptureError as error:
        raise UsageError(str(error)) from None
    start_level = canonical.cfg.start_level
    assert start_level is not None
    return {"stage2_page_tables": to_kernel(canonical, folder), "ipa_range": f"{canonical.cfg.ia_bits:2d}\n",
            "stage2_levels": f"{4 - start_level}\n",
            **{f"nested/{table.file}": to_kernel(table, folder) for table in shadows}}
