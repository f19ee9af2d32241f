"""The text of Linux 7.2's ``stage2_page_tables`` (arch/arm64/kvm/ptdump.c, mm/ptdump.c), written and read."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt

from s2shadow.constants import EXEC, EXEC_EL0, READ, WRITE
from s2shadow.ranges import (
    AF,
    KERNEL_MASK,
    LAST_LEVEL,
    PAGE,
    S2AP_R,
    S2AP_W,
    TABLE,
    TYPE,
    VALID,
    XN_SHIFT,
    DumpError,
    Rows,
    State,
    Words,
    blank,
    merge,
)

LONGEST_LINE = 4096
MARKER = "---[ Guest IPA ]---"
UNITS = "KMGTPE"
XN_TEXT = ("px ux ", "PXNux ", "PXNUXN", "px UXN")
ATTRS_WIDTH = 20
FOUND = np.dtype([("start", "u8"), ("end", "u8"), ("level", "i1"), ("attrs", "u8")])
NO_LINE = (0, 0, -2, 0)     # before the first: ends where that must start, and equals none
LINE = re.compile(r"0x([0-9a-f]{16})-0x([0-9a-f]{16})   ( *[0-9]+[KMGTPE]) (-1|[0-3])(.*)", re.ASCII)
ATTRS = re.compile(r" ([ F]) ([ R]) ([ W]) (px ux |PXNux |PXNUXN|px UXN) (AF|  ) (BLK|   )")


def kernel_text(rows: Rows) -> str:
    """What Linux 7.2 prints for these tables in ``stage2_page_tables``, to the letter.

    Consecutive entries of one level and one set of masked attributes are one line, invalid ones too. The run that
    reaches the end of the IPA space is not in it: the kernel prints a run when the next one starts. ``DumpError``
    where a table cannot be followed: Linux would have followed it.
    """
    return "".join(kernel_lines(rows))


def kernel_lines(rows: Rows) -> Iterator[str]:
    """``kernel_text`` line by line."""
    lost = rows[(rows["state"] == State.NO_TABLE) | is_table(rows)]
    if len(lost):
        raise DumpError(f"the table for {int(lost['start'][0]):#x} cannot be read, and the kernel's format has no "
                        "word for that")
    runs = merge(rows, goes_on_in_kernel)
    if not is_kernel_text(rows):
        runs = runs[:-1]
    yield MARKER + "\n"
    known: dict[int, str] = {}
    for start, end, level, attrs in zip(*(runs[name].tolist() for name in ("start", "end", "level", "attrs")),
                                        strict=True):
        attrs &= KERNEL_MASK
        if attrs not in known:
            known[attrs] = attrs_text(attrs)
        yield f"0x{start:016x}-0x{end:016x}   {kernel_size(end - start)} {level}{known[attrs]}\n"


def goes_on_in_kernel(before: Rows, after: Rows) -> npt.NDArray[np.bool_]:
    """Whether the kernel prints two rows as one run: by level and masked attributes."""
    return (before["level"] == after["level"]) & ((before["attrs"] ^ after["attrs"]) & KERNEL_MASK == 0)


def is_table(rows: Rows) -> npt.NDArray[np.bool_]:
    return (rows["attrs"] & TYPE == TYPE) & (rows["level"] < LAST_LEVEL)


@lru_cache(4096)
def kernel_size(size: int) -> str:
    """From KiB upward for as long as it divides evenly."""
    size >>= 10
    unit = 0
    while size % 1024 == 0 and unit < len(UNITS) - 1:
        size //= 1024
        unit += 1
    return f"{size:9d}{UNITS[unit]}"


def attrs_text(attrs: int) -> str:
    """The attribute columns: each preceded by a blank and as wide as its longest word; nothing for 0."""
    if not attrs:
        return ""
    return " ".join(("", " " if attrs & VALID else "F", "R" if attrs & S2AP_R else " ",
                     "W" if attrs & S2AP_W else " ", XN_TEXT[attrs >> XN_SHIFT & 3], "AF" if attrs & AF else "  ",
                     "BLK" if attrs & TYPE == VALID else "   "))


def parse_kernel_text(lines: str | Iterable[str], name: str = "kernel dump") -> Rows:
    """``RANGE_DTYPE`` of a ``stage2_page_tables`` text, given whole or line by line (a file that was opened, say).

    Every line must be as Linux 7.2 prints it, and begin where the one before ended; blanks at a line's end may be
    lost. ``DumpError`` names the first line that is not so, or says that the text is cut short. A text cut between two
    lines cannot be told from a whole one: see ``ends_inside_table``.
    """
    if isinstance(lines, str):
        lines = io.StringIO(lines, newline="\n")
    reader = KernelReader(name)
    from_file = isinstance(lines, io.TextIOBase)
    if isinstance(lines, io.TextIOBase):
        lines = iter(partial(lines.readline, LONGEST_LINE), "")     # a file without lines may have no end
    for line in lines:
        if from_file and not line.endswith("\n"):
            if len(line) == LONGEST_LINE:
                reader.read(line)           # which says what it should have been
            raise DumpError(f"{name}: line {reader.number + 1} is cut short: {shown(line)}")
        reader.read(line)
    return reader.rows()


class KernelReader:
    def __init__(self, name: str):
        self.name = name
        self.number = 0
        self.found: list[tuple[int, int, int, int]] = []      # as FOUND
        self.known: dict[str, int] = {}

    def error(self, text: str) -> DumpError:
        return DumpError(f"{self.name}: line {self.number}: {text}")

    def read(self, line: str) -> None:
        self.number += 1
        if self.number == 1:
            if line.rstrip(" \r\n") != MARKER:
                raise self.error(f"must be {MARKER!r}, got {shown(line)}")
            return
        match = LINE.fullmatch(line.rstrip("\r\n"))
        if match is None:
            raise self.error(f"not a range as Linux 7.2 prints it: {shown(line)}")
        self.add(int(match[1], 16), int(match[2], 16), match[3], int(match[4]), match[5])

    def add(self, start: int, end: int, size: str, level: int, text: str) -> None:
        last = self.found[-1] if self.found else NO_LINE
        if start != last[1]:
            raise self.error(f"starts at {start:#x}, but the line before ends at {last[1]:#x}" if self.found else
                             f"starts at {start:#x}, but the first range starts at 0")
        if end <= start or (start | end) % PAGE:
            raise self.error(f"no range of pages: {start:#x} to {end:#x}")
        if size != kernel_size(end - start):
            raise self.error(f"the range is {kernel_size(end - start).strip()}, but the line says {size.strip()}")
        attrs = self.attributes(text, level)
        if (level, attrs) == last[2:]:
            if attrs & VALID or not attrs:
                raise self.error("level and attributes of the line before: Linux prints them as one range")
            attrs ^= TABLE      # bit 1 of an invalid entry tells runs apart, and no column shows it
        self.found.append((start, end, level, attrs))

    def attributes(self, text: str, level: int) -> int:
        attrs = self.known.get(text)
        if attrs is None:
            attrs = self.known[text] = parse_attrs(text)
        if attrs < 0:
            raise self.error(f"not attributes as Linux 7.2 prints them: {shown(text)}")
        if attrs & TYPE == TYPE and level < LAST_LEVEL:
            raise self.error(f"valid at level {level}, but no block")
        return attrs

    def rows(self) -> Rows:
        if not self.number:
            raise DumpError(f"{self.name} is empty")
        found = np.array(self.found, dtype=FOUND)
        rows = blank(len(found))
        for name in FOUND.names or ():
            rows[name] = found[name]
        return name_leaves(rows)


def shown(line: str) -> str:
    text = line.rstrip("\r\n")
    return repr(text if len(text) <= 100 else text[:97] + "...")


def parse_attrs(text: str) -> int:
    """Masked descriptor bits of the attribute columns; -1 if they are not such columns."""
    text = text.rstrip(" ")
    if not text:
        return 0
    match = ATTRS.fullmatch(text.ljust(ATTRS_WIDTH))
    if match is None:
        return -1
    invalid, read, write, execute, young, block = match.groups()
    attrs = XN_TEXT.index(execute) << XN_SHIFT
    attrs |= S2AP_R if read == "R" else 0
    attrs |= S2AP_W if write == "W" else 0
    attrs |= AF if young == "AF" else 0
    if invalid == " ":
        return attrs | (VALID if block == "BLK" else TYPE)
    if block == "BLK":
        return -1
    return attrs or TABLE       # attributes are printed only if one is set, and the one that no column shows is bit 1


def name_leaves(rows: Rows) -> Rows:
    """State and permissions by the bits that the kernel prints."""
    attrs = rows["attrs"]
    valid = attrs & VALID != 0
    rows["state"] = np.where(valid, State.MAPPED, State.INVALID)
    rows["state"][(attrs & TYPE == VALID) & (rows["level"] == LAST_LEVEL)] = State.RESERVED
    rows["state"][is_table(rows)] = State.ADDRESS_SIZE
    rows["perm"] = np.where(rows["state"] == State.MAPPED, perm_of(attrs), 0)
    return rows


def perm_of(attrs: Words) -> npt.NDArray[np.uint8]:
    """Access bits of S2AP and XN (with FEAT_XNX, which the kernel's words assume)."""
    execute = np.array([EXEC | EXEC_EL0, EXEC_EL0, 0, EXEC], np.uint8)[(attrs >> np.uint64(XN_SHIFT)).astype(int) & 3]
    read = np.where(attrs & S2AP_R, READ, 0).astype(np.uint8)
    return execute | read | np.where(attrs & S2AP_W, WRITE, 0).astype(np.uint8)


def as_kernel(rows: Rows) -> Rows:
    """The same map as its kernel text shows it, but with the last run."""
    runs = merge(rows, goes_on_in_kernel)
    seen = blank(len(runs))
    for name in ("start", "end", "level"):
        seen[name] = runs[name]
    seen["attrs"] = runs["attrs"] & KERNEL_MASK
    return name_leaves(seen)


def is_kernel_text(rows: Rows) -> bool:
    """Whether a map was read from kernel text: no block sizes, and the run behind the last is not in it."""
    return not len(rows) or not rows["size"][0]


def ends_inside_table(rows: Rows) -> bool:
    """Whether a kernel text ends where one would not expect it, so that it may have been cut.

    The run that is not printed reaches to the end of the IPA space on one level: from the inside of a last-level table
    only where there are tables all the way.
    """
    return bool(len(rows)) and is_kernel_text(rows) and int(rows["end"][-1]) % (2 << 20) != 0


def kernel_name(vttbr: int, vtcr: int, enabled: bool = True) -> str:
    """Name of a shadow's file under ``nested/``: L1's VTTBR_EL2 (without CnP, which KVM drops) and VTCR_EL2."""
    return f"0x{vttbr & ~1:016x}-0x{vtcr:016x}-s2-{'en' if enabled else 'dis'}abled"
