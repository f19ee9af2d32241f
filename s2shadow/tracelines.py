"""The lines of a trace: how each event is written, and what becomes of it.

Text comes from ftrace (``trace``, ``trace_pipe``), ``trace-cmd report`` and ``perf script``, which differ in what
stands before the event; the CSV of executed instructions has one line for each.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from s2shadow.events import EVENT_DTYPE, RAW_ROW, UNKNOWN, EventKind, Events, Note, TraceError, fault_access
from s2shadow.tracescan import NUMBERS, Template, scan_lines, scan_text

NOTES_LIMIT = 65_536
NOTE_LIMIT = 4096           # bytes of one
NAMES_LIMIT = 4096          # event names that are counted one by one
EXAMPLES = 10               # unreadable lines that are kept
ADDRESSES = {name for name in EVENT_DTYPE.names or () if EVENT_DTYPE[name] == np.uint64}     # what texts give as it is

Columns = dict[str, Any]
Finish = Callable[[Events, Columns], None]


class Shape(NamedTuple):
    """How one event is written (``tracescan.Template``; more text may follow), and what becomes of its values.

    Values named like a field of EVENT_DTYPE go there; the others are what ``finish`` makes use of.
    """

    kind: EventKind
    template: str
    finish: Finish | None = None


def probe(kind: EventKind, arguments: str = "", finish: Finish | None = None) -> Shape:
    return Shape(kind, f"{{:probe}} {arguments}".rstrip(), finish)


def add(start: npt.NDArray[np.uint64], size: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Sums that stop at the largest address instead of wrapping to the lowest."""
    end: npt.NDArray[np.uint64] = start + size
    end[end < start] = np.iinfo(np.uint64).max
    return end


def sized(rows: Events, columns: Columns) -> None:
    rows["end"] = add(rows["start"], columns["size"])


def mapped(rows: Events, columns: Columns) -> None:
    if "size" in columns:
        sized(rows, columns)
    prot = rows["value"]        # enum kvm_pgtable_prot of Linux 7: PX, UX, W, R from bit 0
    rows["access"] = (prot >> 3 & 1) | (prot >> 1 & 2) | (prot & 1) << 2 | (prot >> 1 & 1) << 5


def aged(rows: Events, columns: Columns) -> None:
    sized(rows, columns)
    rows["flags"] = columns["mkold"] != 0


def levelled(rows: Events, columns: Columns) -> None:
    level = columns["level"].view(np.int64)
    rows["level"] = np.where((level >= -1) & (level <= 3), level, -2)   # Linux says INT_MAX for any level


def guest_fault(rows: Events, columns: Columns) -> None:
    rows["access"] = fault_access(rows["value"])


def flag(rows: Events, columns: Columns) -> None:
    rows["flags"] = columns["flag"] != 0


def word(text: bytes) -> int:
    """A word as the scanner gives it."""
    return int.from_bytes(text[:8], "little")


def numbered(words: npt.NDArray[np.uint64], *choices: bytes) -> npt.NDArray[np.intp]:
    """The index of each word among the choices; their number for any other."""
    return np.select([words == word(choice) for choice in choices], range(len(choices)), len(choices))


def exited(rows: Events, columns: Columns) -> None:
    rows["flags"] = numbered(columns["why"], b"IRQ", b"SERROR", b"TRAP")


def injected(rows: Events, columns: Columns) -> None:
    rows["flags"] = numbered(columns["why"], b"SYNC", b"IRQ")


def system_word(read: Any, op0: Any, op1: Any, crn: Any, crm: Any, op2: Any) -> Any:
    """The MSR, MRS or SYS instruction of an encoding, Rt left 0."""
    return (0xD5000000 | read << 21 | (op0 & 3) << 19 | (op1 & 7) << 16 | (crn & 15) << 12 | (crm & 15) << 8
            | (op2 & 7) << 5)


def sys_access(rows: Events, columns: Columns) -> None:
    write = columns["direction"] == word(b"write")
    operands = [columns[name].astype(np.uint32) for name in ("op0", "op1", "crn", "crm", "op2")]
    rows["insn"] = system_word((~write).astype(np.uint32), *operands)
    rows["flags"] = write


def handled_tlbi(rows: Events, columns: Columns) -> None:
    op1, crm, op2 = (columns[name].astype(np.uint32) for name in ("op1", "crm", "op2"))
    rows["insn"] = system_word(0, 1, op1, 8, crm, op2)


def memslot(rows: Events, columns: Columns) -> None:
    sized(rows, columns)
    rows["flags"] = columns["flags"] & 0xFFFF


def in_pages(page: int) -> Finish:
    def finish(rows: Events, columns: Columns) -> None:
        rows["end"] = add(rows["start"], np.minimum(columns["pages"], np.uint64((1 << 52) // page)) * np.uint64(page))
    return finish


def frames(page: int) -> Finish:
    def finish(rows: Events, columns: Columns) -> None:
        for name in ("start", "end"):
            rows[name] = np.minimum(columns[name], np.uint64((1 << 52) // page)) * np.uint64(page)
    return finish


def shapes(page: int) -> dict[bytes, Shape]:
    """Every event that becomes a row, by the name it has in the trace. ``page``: page size of the traced host."""
    k = EventKind
    handler = "op1={op1:n} crm={crm:n} op2={op2:n}"
    table = {
        # arch/arm64/kvm/trace_arm.h, trace_handle_exit.h
        "kvm_guest_fault": Shape(k.GUEST_FAULT, "ipa {start:x}, {:w} {value:x}, hxfar {va:x}, pc {pc:x}", guest_fault),
        "kvm_access_fault": Shape(k.ACCESS_FAULT, "IPA: {start:x}"),
        "kvm_unmap_hva_range": Shape(k.UNMAP_HVA, "mmu notifier unmap range: {start:x} -- {end:x}"),
        "kvm_age_hva": Shape(k.AGE_HVA, "mmu notifier age hva: {start:x} -- {end:x}"),
        "kvm_test_age_hva": Shape(k.TEST_AGE_HVA, "mmu notifier test age hva: {start:x}"),
        "kvm_exit": Shape(k.EXIT, "{why:w}: HSR_EC: {value:x} ({:text}), PC: {pc:x}", exited),
        "kvm_sys_access": Shape(
            k.SYS_ACCESS, "PC: {pc:x} {:text}({op0:n},{op1:n},{crn:n},{crm:n},{op2:n}) {direction:w}", sys_access),
        "kvm_nested_eret": Shape(k.NESTED_ERET, "elr_el2: {pc:x} spsr_el2: {value:x} {:text}hcr_el2: {hcr:x}"),
        "kvm_inject_nested_exception": Shape(
            k.NESTED_EXCEPTION, "{why:w}: esr_el2 {value:x} elr_el2: {pc:x} {:text}hcr_el2: {hcr:x}", injected),
        # kprobes on kvm_pgtable_stage2_* and around them
        "map": probe(k.MAP, "pgd={root:n} ipa={start:n} size={size:n} pa={pa:n} prot={value:n}", mapped),
        "unmap": probe(k.UNMAP, "pgd={root:n} ipa={start:n} size={size:n}", sized),
        "wrprotect": probe(k.WRPROTECT, "pgd={root:n} ipa={start:n} size={size:n}", sized),
        "relax": probe(k.RELAX, "pgd={root:n} ipa={start:n} prot={value:n}", mapped),
        "mkyoung": probe(k.MKYOUNG, "pgd={root:n} ipa={start:n}"),
        "age": probe(k.AGE, "pgd={root:n} ipa={start:n} size={size:n} mkold={mkold:n}", aged),
        "split": probe(k.SPLIT, "pgd={root:n} ipa={start:n} size={size:n}", sized),
        "destroy": probe(k.DESTROY, "pgd={root:n}"),
        "gfn_unmap": probe(k.GFN_UNMAP, "start={start:n} end={end:n}", frames(page)),
        "mn_start": probe(k.MN_START, "start={start:n} end={end:n} event={value:n}"),
        "mn_end": probe(k.MN_END, "start={start:n} end={end:n}"),
        "memslot": probe(k.MEMSLOT, "slot={value:n} flags={flags:n} gpa={start:n} size={size:n} hva={va:n}", memslot),
        "tlb_ipa": probe(k.TLB_IPA, "pgd={root:n} ipa={start:n} level={level:d}", levelled),
        "tlb_ipa_nsh": probe(k.TLB_IPA_NSH, "pgd={root:n} ipa={start:n} level={level:d}", levelled),
        "tlb_range": probe(k.TLB_RANGE, "pgd={root:n} start={start:n} pages={pages:n}", in_pages(page)),
        "tlb_vmid": probe(k.TLB_VMID, "pgd={root:n}"),
        "tlb_cpu": probe(k.TLB_CPU, "pgd={root:n}"),
        "tlb_allvm": probe(k.TLB_ALL),
        "nested_unmap": probe(k.NESTED_UNMAP, "may_block={flag:n}", flag),
        "nested_wp": probe(k.NESTED_WRPROTECT),
        "nested_flush": probe(k.NESTED_FLUSH),
        "shadow_unmap_range": probe(k.SHADOW_UNMAP_RANGE, "pgd={root:n}"),
        "shadow_unmap_ipa": probe(k.SHADOW_UNMAP_IPA, "pgd={root:n}"),
        "shadow_tlbi_s1e1": probe(k.SHADOW_TLBI_S1, "pgd={root:n}"),
        "shadow_lookup": probe(k.SHADOW_LOOKUP),
        "walk_nested": probe(k.WALK_NESTED, "ipa={start:n}"),
        "s2_fault_inject": probe(k.INJECT_FAULT, "esr={value:n}"),
        "h_ipas2e1is": probe(k.HANDLE_TLBI, f"{handler} val={{value:n}}", handled_tlbi),
        "h_ripas2e1is": probe(k.HANDLE_TLBI, f"{handler} val={{value:n}}", handled_tlbi),
        "h_vmalls12e1is": probe(k.HANDLE_TLBI, handler, handled_tlbi),
        "h_alle1is": probe(k.HANDLE_TLBI, handler, handled_tlbi),
        "h_tlbi_el1": probe(k.HANDLE_TLBI, f"{handler} val={{value:n}}", handled_tlbi),
        "h_tlbi_el2": probe(k.HANDLE_TLBI, f"{handler} val={{value:n}}", handled_tlbi),
        "tracing_mark_write": Shape(k.NOTE, "{text:rest}"),
        "print": Shape(k.NOTE, "{text:rest}"),      # what trace-cmd and perf call it
    }
    return {name.encode(): value for name, value in table.items()}


# Comments, headers, stack traces: not events, and nothing is missing
PASSED_OVER = re.compile(rb"\s*$|\s*#|cpus=\d+$|version = |CPU \d+ is empty|\s*=> |.*<stack trace>$"
                         rb"|\s+[0-9a-f]{8,16} .*\)$")
LOST = re.compile(rb".*(?:\[LOST (\d{1,18}) EVENTS|\[(\d{1,18}) EVENTS DROPPED|PERF_RECORD_LOST lost (\d{1,18}))")
# A comment in a trace that was made smaller
LEFT_OUT = re.compile(rb"# (\d{1,18}) (\w{1,64}) lines\b.* left out\b")
OVERWRITTEN = re.compile(rb"# entries-in-buffer/entries-written: (\d{1,18})/(\d{1,18})")


class Tally:
    """What a trace holds beside its rows."""

    def __init__(self) -> None:
        self.unreadable = self.lost = self.notes_left_out = 0
        self.unreadable_lines: list[tuple[int, str]] = []
        self.notes: list[Note] = []
        self.left_out: list[tuple[int, str, int]] = []
        self.names: Counter[bytes] = Counter()

    def count(self, name: bytes, times: int) -> None:
        """Count events. Of a flood of names only the first are told apart."""
        known = len(self.names) < NAMES_LIMIT or name in self.names
        if times:
            self.names[name if known else b"(other)"] += times

    def reject(self, line: int, text: bytes) -> None:
        """Count a line that cannot be read."""
        self.unreadable += 1
        if len(self.unreadable_lines) < EXAMPLES:
            self.unreadable_lines.append((line, text[:200].decode(errors="replace").strip()))

    def note(self, time: int, text: bytes) -> int:
        """Keep what user space wrote -> its index, that of the end once there are too many."""
        if len(self.notes) < NOTES_LIMIT:
            self.notes.append(Note(time, text[:NOTE_LIMIT].decode(errors="replace")))
            return len(self.notes) - 1
        self.notes_left_out += 1
        return NOTES_LIMIT


class TextParser:
    """Takes blocks of text apart. ``page``: page size of the traced host."""

    def __init__(self, tally: Tally, page: int):
        self.tally = tally
        table = shapes(page)
        self.names = list(table)
        self.shapes = list(table.values())
        self.templates = {name: Template(shape.template, code) for code, (name, shape) in enumerate(table.items())}

    def parse(self, block: bytes, first_line: int) -> tuple[Events, int]:
        """Rows of the whole lines in ``block`` (without the last newline), and how many lines there are."""
        room = block.count(b"\n") + 1
        rows = np.zeros(room, EVENT_DTYPE)
        values = np.empty((room, NUMBERS), np.uint64)
        codes = np.empty(room, np.uint8)
        others: dict[bytes, int] = {}
        odd: list[tuple[int, bytes]] = []
        n, lines = scan_text(block, first_line, self.templates, rows, values, codes, others, odd)
        rows, values, codes = rows[:n], values[:n], codes[:n]
        raw = rows.view(RAW_ROW)
        rows["vm"] = UNKNOWN
        counts = np.bincount(codes, minlength=len(self.names))
        for code in np.flatnonzero(counts).tolist():
            self.tally.count(self.names[code], int(counts[code]))
            where = np.flatnonzero(codes == code)
            raw[where] = self.filled(code, raw[where].view(EVENT_DTYPE), values[where]).view(RAW_ROW)
        for name, count in others.items():
            self.tally.count(name, count)
        self.take_notes(rows, values, block)
        self.pass_over(odd)
        return rows, lines

    def filled(self, code: int, rows: Events, values: npt.NDArray[np.uint64]) -> Events:
        """Rows of one event with what its text says."""
        shape = self.shapes[code]
        columns = dict(zip(self.templates[self.names[code]].names, values.T, strict=False))
        rows["kind"] = shape.kind
        for name in columns.keys() & ADDRESSES:
            rows[name] = columns[name]
        if "end" not in columns:
            rows["end"] = rows["start"]
        if shape.finish is not None:
            shape.finish(rows, columns)
        return rows

    def pass_over(self, odd: list[tuple[int, bytes]]) -> None:
        for line, text in odd:
            if lost := LOST.match(text):
                self.tally.lost += int(lost[1] or lost[2] or lost[3])
            elif overwritten := OVERWRITTEN.match(text):
                self.tally.lost += max(int(overwritten[2]) - int(overwritten[1]), 0)
            elif left_out := LEFT_OUT.match(text):
                if len(self.tally.left_out) < NOTES_LIMIT:
                    self.tally.left_out.append((line, left_out[2].decode(), int(left_out[1])))
            elif not PASSED_OVER.match(text):
                self.tally.reject(line, text)

    def take_notes(self, rows: Events, values: npt.NDArray[np.uint64], block: bytes) -> None:
        for at in np.flatnonzero(rows["kind"] == int(EventKind.NOTE)).tolist():
            text = block[values[at, 0]:values[at, 1]].strip().removeprefix(b"tracing_mark_write: ")
            rows["value"][at] = self.tally.note(int(rows["time"][at]), text)


# --- the CSV of instructions -----------------------------------------------------------------------------------

CSV_HEADER = b"seq,us,vcpu,el,event,op,insn,xt,x1,vttbr_el2,vtcr_el2,hcr_el2"
CSV_FIELDS = {b"seq": "{seq:n}", b"us": "{us:n}", b"vcpu": "{vcpu:n}", b"el": "{el:n}", b"event": "{event:w}",
              b"insn": "{insn:x}", b"xt": "{value:x}", b"x1": "{start:x}", b"vttbr_el2": "{vttbr:x}",
              b"vtcr_el2": "{vtcr:x}", b"hcr_el2": "{hcr:x}"}
CSV_OPTIONAL = {b"seq", b"op", b"x1"}
CSV_KINDS = {b"TLBI": EventKind.TLBI, b"VTTBR": EventKind.SET_VTTBR, b"VTCR": EventKind.SET_VTCR,
             b"ENTRY": EventKind.ENTER, b"MARK": EventKind.MARK, b"FOLD": EventKind.FOLD}


class CsvParser:
    """Rows of the CSV: one instruction each, before its execution; numbers are hexadecimal from ``insn`` on.

    The header may name the columns in any order, and leave out seq, op and x1; others are ignored.
    ``op`` is not read: the instruction word says what it is.
    """

    def __init__(self, tally: Tally, header: bytes, name: str):
        self.tally = tally
        self.columns = header.split(b",")
        if missing := sorted(set(CSV_HEADER.split(b",")) - CSV_OPTIONAL - set(self.columns)):
            raise TraceError(f"{name} has no column {', '.join(column.decode() for column in missing)}")
        if len(set(self.columns)) < len(self.columns):
            raise TraceError(f"{name} names a column twice")
        self.template = Template(",".join(CSV_FIELDS.get(name, "{:cell}") for name in self.columns) + "$")

    def parse(self, block: bytes, first_line: int) -> tuple[Events, int]:
        room = block.count(b"\n") + 1
        values = np.empty((room, NUMBERS), np.uint64)
        numbers = np.empty(room, np.uint64)
        odd: list[tuple[int, bytes]] = []
        n, lines = scan_lines(block, first_line, self.template, values, numbers, odd)
        columns = dict(zip(self.template.names, values[:n].T, strict=False))
        kinds = np.zeros(n, np.uint8)
        for name, kind in CSV_KINDS.items():
            these = columns["event"] == word(name)
            kinds[these] = kind
            self.tally.count(name, int(np.count_nonzero(these)))
        good = (kinds != 0) & (columns["vcpu"] < 1 << 15) & (columns["el"] <= 3) & (columns["insn"] < 1 << 32)
        texts = block.split(b"\n") if not good.all() else []
        odd += [(line, texts[line - first_line]) for line in numbers[:n][~good].tolist()]
        for line, text in sorted(odd):
            if not text.startswith(b"#") and text.split(b",") != self.columns:
                self.tally.reject(line, text)
        columns = {name: values[good] for name, values in columns.items()}
        return self.make_rows(columns, kinds[good], numbers[:n][good]), lines

    @staticmethod
    def make_rows(columns: Columns, kinds: npt.NDArray[np.uint8], numbers: npt.NDArray[np.uint64]) -> Events:
        rows = np.zeros(len(kinds), EVENT_DTYPE)
        rows["kind"] = kinds
        rows["seq"] = columns.get("seq", numbers)
        rows["time"] = np.minimum(columns["us"], np.uint64(1 << 53)) * np.uint64(1000)
        rows["vm"] = UNKNOWN
        rows["cpu"] = columns["vcpu"]
        for name in ("vcpu", "el", "insn", "value", "vttbr", "vtcr", "hcr"):
            rows[name] = columns[name]
        if "start" in columns:
            rows["start"] = rows["end"] = columns["start"]
        return rows


def csv_header(block: bytes) -> bytes | None:
    """The header of a CSV that begins with ``block``; None if this is no CSV. Without a header it is the usual one."""
    lines = (line.strip() for line in block.split(b"\n", 100))
    first = next((line for line in lines if line and not line.startswith(b"#")), b"")
    cells = first.split(b",")
    if b"event" in cells and b"insn" in cells:
        return first
    return CSV_HEADER if len(cells) == CSV_HEADER.count(b",") + 1 and cells[4] in CSV_KINDS else None
