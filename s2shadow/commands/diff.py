"""``s2shadow diff``: two stage-2 maps, range by range."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from s2shadow.commands.common import (
    EXIT_DIFFERENT,
    EXIT_OK,
    UsageError,
    add_outputs,
    check_outputs,
    error_text,
    number,
    text_stream,
    write_output,
)
from s2shadow.commands.dump import add_table_choice, check_table_choice, open_table

if TYPE_CHECKING:
    from s2shadow.ranges import Rows
    from s2shadow.report import Line

KERNEL_FILE = "stage2_page_tables"
HEADINGS = ("IPA", "size", "difference", "A", "B")
SIDE = ("size", "level", "perm", "young", "memattr", "sh", "pa")


class Operand(NamedTuple):
    name: str
    rows: Rows
    notes: tuple[str, ...] = ()


def add(commands: Any) -> None:
    diff = commands.add_parser(
        "diff", help="compare two stage-2 maps: dumps of ours, of a real host, captures", allow_abbrev=False,
        description="Compares two stage-2 maps range by range, whatever the ranges are cut into: what only A maps, "
                    "what only B maps, and where permissions, block sizes, output addresses or memory attributes "
                    "differ. Each is a file with what Linux prints in stage2_page_tables or under nested/, a JSON file "
                    "of s2shadow dump, a capture, or - for stdin. What a side does not say (Linux prints no output "
                    "addresses) is not compared. Exit code 0: the same, 1: different, 2: error.")
    diff.set_defaults(run=run)
    diff.add_argument("a", metavar="A", help="dump file, capture folder, or -")
    diff.add_argument("b", metavar="B", nargs="?", help="the same; may be left out with --engine: A's captured shadow")
    add_table_choice(diff)
    diff.add_argument("--strict", action="store_true",
                      help="with --engine: count as missing what the other side has not mapped (yet)")
    diff.add_argument("--access-flag", action="store_true", help="compare access flags too")
    diff.add_argument("--limit", type=number(0), default=20, metavar="N",
                      help="ranges to show (default 20, 0: all); JSON and CSV have all")
    add_outputs(diff)


def run(options: argparse.Namespace) -> int:
    from s2shadow.rangediff import Difference, diff
    from s2shadow.report import emit, write_json, write_text

    check_table_choice(options)
    if options.b is None and not options.engine:
        raise UsageError("the following arguments are required: B (see s2shadow diff --help)")
    if options.strict and not options.engine:
        raise UsageError("--strict goes with --engine")
    if options.a == "-" and options.b == "-":
        raise UsageError("only one of A and B can be stdin")
    check_captures(options)
    check_outputs(options, options.a, options.b)
    a, b = read_a(options), read_operand(options.a if options.b is None else options.b, options)
    found = diff(a.rows, b.rows, options.access_flag)
    unfilled = found[:0]
    if options.engine and not options.strict:
        # a shadow is filled on demand: what its host has not mapped yet is no difference
        unfilled = found[found["kind"] == Difference.MISSING]
        found = found[found["kind"] != Difference.MISSING]
    stream = text_stream(options)
    if stream is not None:
        lines = diff_lines(a, b, found, unfilled, options.limit)
        write_output(lambda: emit(lines, stream))
    if options.json is not None:
        write_output(lambda: write_json(diff_json(a, b, found, unfilled), options.json), options.json)
    if options.csv is not None:
        write_output(lambda: write_text(diff_csv(found), options.csv), options.csv)
    return EXIT_DIFFERENT if len(found) else EXIT_OK


# --- operands --------------------------------------------------------------------------------------------------


def check_captures(options: argparse.Namespace) -> None:
    """Options that choose a table need a capture to choose from."""
    if options.engine and not is_capture(options.a):
        raise UsageError(f"--engine needs a nested capture as A, got {options.a}")
    chosen = [name for name, value in (("--vm", options.vm), ("--nested", options.nested)) if value is not None]
    chosen += ["--host"] * options.host + ["--tables"] * (options.tables != "auto")
    if chosen and not is_capture(options.a) and not is_capture(options.b):
        raise UsageError(f"{chosen[0]} needs a capture, and neither {options.a} nor {options.b} is one")


def is_capture(text: str) -> bool:
    """A folder, unless it is one of Linux's files, as ``dump -o`` writes it."""
    path = Path(text)
    linux = (path / KERNEL_FILE).is_file() and not (path / "tables.npz").is_file()
    return text != "-" and path.is_dir() and not linux


def read_a(options: argparse.Namespace) -> Operand:
    if not options.engine:
        return read_operand(options.a, options)
    table = open_table(options.a, options, engine=True)
    return Operand(f"{options.a}: {table.label}", table.rows)


def read_operand(text: str, options: argparse.Namespace) -> Operand:
    from s2shadow.inputs import open_input
    from s2shadow.kerneltext import ends_inside_table
    from s2shadow.ranges import DumpError

    if is_capture(text):
        table = open_table(text, options, engine=False)
        return Operand(f"{text}: {table.label}", table.rows)
    path = Path(text, KERNEL_FILE) if Path(text).is_dir() and text != "-" else Path(text)
    name = "stdin" if text == "-" else str(path)
    try:
        if text == "-":
            rows = read_dump(sys.stdin.buffer, name)
        else:
            with open_input(path) as stream:
                rows = read_dump(stream, name)
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error_text(error)}") from None
    except DumpError as error:
        raise UsageError(str(error)) from None
    cut = (f"the text ends at {int(rows['end'][-1]):#x}, inside a table: it may have been cut short",)
    return Operand(name, rows, cut if ends_inside_table(rows) else ())


def read_dump(stream: BinaryIO, name: str) -> Rows:
    """Kernel text or our JSON, by what it starts with."""
    import io

    from s2shadow.kerneltext import parse_kernel_text

    buffered = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream)  # type: ignore[type-var]
    if buffered.peek(1)[:1] in (b"{", b"["):
        return read_json(buffered.read(), name)
    text = io.TextIOWrapper(buffered, encoding="ascii", errors="backslashreplace", newline="\n")
    try:
        return parse_kernel_text(text, name)
    finally:
        text.detach()


def read_json(data: bytes, name: str) -> Rows:
    import json

    from s2shadow.ranges import DumpError, from_records

    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DumpError(f"{name} is not JSON: {error}") from None
    if not isinstance(found, dict) or "ranges" not in found:
        raise DumpError(f"{name} is no dump: it has no ranges")
    if found.get("schema") != 1:
        raise DumpError(f"{name}: schema must be 1, got {found.get('schema')!r}")
    rows = from_records(found["ranges"], name)
    bits = found.get("ipa_bits")
    if not len(rows) or not isinstance(bits, int) or int(rows["end"][-1]) != 1 << max(0, min(bits, 63)):
        raise DumpError(f"{name}: the ranges do not reach to the end of the IPA space (ipa_bits is {bits!r})")
    return rows


# --- outcome ---------------------------------------------------------------------------------------------------


def words(kind: int) -> list[str]:
    from s2shadow.rangediff import Difference

    return [str(bit.name).lower().replace("_", " ") for bit in Difference if kind & bit]


def counts(found: Rows) -> dict[str, dict[str, int]]:
    """Ranges and bytes by kind of difference; a range with two kinds counts in both."""
    from s2shadow.rangediff import Difference

    result = {}
    for bit in Difference:
        rows = found[found["kind"] & bit != 0]
        if len(rows):
            result[words(bit)[0]] = {"ranges": len(rows), "bytes": int((rows["end"] - rows["start"]).sum())}
    return result


def diff_lines(a: Operand, b: Operand, found: Rows, unfilled: Rows, limit: int) -> list[Line]:
    from s2shadow.report import Line, bytes_text, columns

    lines = [Line(f"A   {a.name}: {mapped_text(a.rows)}"), Line(f"B   {b.name}: {mapped_text(b.rows)}")]
    lines += [Line(f"    {side}: {note}", "yellow") for side, operand in (("A", a), ("B", b)) for note in operand.notes]
    if len(unfilled):
        size = int((unfilled["end"] - unfilled["start"]).sum())
        lines.append(Line(f"    not mapped in B (yet), which is no difference: {bytes_text(size)} in "
                          f"{ranges_text(len(unfilled))}; --strict counts it"))
    if not len(found):
        return [*lines, Line("no difference", "green")]
    shown = found if not limit else found[:limit]
    heading, *body = columns([HEADINGS, *(cells(row) for row in shown)], left=(0, 2, 3, 4))
    lines += [Line(), Line(heading, "bold"), *map(Line, body)]
    if len(shown) < len(found):
        lines.append(Line(f"… and {ranges_text(len(found) - len(shown))} more (--limit 0 shows all)"))
    parts = [f"{what} {ranges_text(count['ranges'])} ({bytes_text(count['bytes'])})"
             for what, count in counts(found).items()]
    return [*lines, Line(), Line(f"different in {ranges_text(len(found))}: {', '.join(parts)}", "bold")]


def ranges_text(count: int) -> str:
    return f"{count:,} range" if count == 1 else f"{count:,} ranges"


def mapped_text(rows: Rows) -> str:
    from s2shadow.ranges import State
    from s2shadow.report import bytes_text

    mapped = rows[rows["state"] == State.MAPPED]
    return f"{bytes_text(int((mapped['end'] - mapped['start']).sum()))} mapped in {ranges_text(len(mapped))}"


def cells(row: Any) -> tuple[str, ...]:
    from s2shadow.constants import size_text

    start, end = int(row["start"]), int(row["end"])
    return (f"0x{start:016x}-0x{end:016x}", size_text(end - start), ", ".join(words(row["kind"])),
            side_text(row, "a"), side_text(row, "b"))


def side_text(row: Any, side: str) -> str:
    from s2shadow.constants import perm_text, size_text
    from s2shadow.rangediff import NOT_MAPPED, Difference

    level, size = int(row[f"{side}_level"]), int(row[f"{side}_size"])
    if level == NOT_MAPPED:
        return "not mapped"
    text = f"{size_text(size) if size else f'level {level}'} {perm_text(int(row[f'{side}_perm']))}"
    if row["kind"] & Difference.ACCESS_FLAG:
        text += " AF" if row[f"{side}_young"] else " no AF"
    if row["kind"] & Difference.ATTRIBUTES:
        text += f" memattr {row[f'{side}_memattr']:#x} sh {row[f'{side}_sh']}"
    if row["kind"] & Difference.ADDRESS:
        text += f" → {int(row[f'{side}_pa']):#x}"
    return text


def record(row: Any) -> dict[str, Any]:
    from s2shadow.constants import perm_text
    from s2shadow.rangediff import NOT_MAPPED, Difference
    from s2shadow.ranges import UNKNOWN

    kind = int(row["kind"])
    found: dict[str, Any] = {"start": f"{int(row['start']):#x}", "end": f"{int(row['end']):#x}",
                             "kind": " ".join(word.replace(" ", "-") for word in words(kind))}
    for side in "ab":
        size, level, perm, young, memattr, sh, pa = (int(row[f"{side}_{name}"]) for name in SIDE)
        mapped = level != NOT_MAPPED
        found |= {f"{side}_level": level if mapped else None, f"{side}_size": size or None,
                  f"{side}_perm": perm_text(perm) if mapped else None,
                  f"{side}_af": young if kind & Difference.ACCESS_FLAG else None,
                  f"{side}_memattr": None if memattr == UNKNOWN else memattr,
                  f"{side}_sh": None if sh == UNKNOWN else sh,
                  f"{side}_pa": f"{pa:#x}" if kind & Difference.ADDRESS else None}
    return found


def diff_json(a: Operand, b: Operand, found: Rows, unfilled: Rows) -> dict[str, Any]:
    sides = {side: {"name": operand.name, "notes": list(operand.notes)} for side, operand in (("a", a), ("b", b))}
    size = int((unfilled["end"] - unfilled["start"]).sum())
    return {"schema": 1, **sides, "same": not len(found), "counts": counts(found),
            "not_mapped_yet": {"ranges": len(unfilled), "bytes": size}, "differences": [record(row) for row in found]}


def diff_csv(found: Rows) -> str:
    import numpy as np

    from s2shadow.rangediff import DIFF_DTYPE
    from s2shadow.report import csv_text

    rows = [record(row) for row in found]
    if rows:
        return csv_text(rows)
    return ",".join(record(np.zeros(1, DIFF_DTYPE)[0])) + "\n"
