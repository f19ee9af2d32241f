"""Stage-2 tables as runs of entries, one ``RANGE_DTYPE`` row each, and as JSON records; see ``s2shadow.dump``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from s2shadow.constants import perm_text
from s2shadow.descriptor import has_blocks

if TYPE_CHECKING:
    from s2shadow.config import Stage2Config
    from s2shadow.engine import NestedVM
    from s2shadow.memory import GuestMemory

Rows = npt.NDArray[np.void]
Words = npt.NDArray[np.uint64]

RANGE_DTYPE = np.dtype([("start", "u8"), ("end", "u8"), ("pa", "u8"), ("size", "u8"), ("attrs", "u8"), ("level", "i1"),
                        ("state", "u1"), ("perm", "u1"), ("memattr", "u1"), ("sh", "u1")], align=True)
NO_ADDRESS = (1 << 64) - 1
UNKNOWN = 255

VALID, TABLE, TYPE, S2AP_R, S2AP_W, AF, NT = 1, 2, 3, 1 << 6, 1 << 7, 1 << 10, 1 << 16
XN_SHIFT = 53
KERNEL_MASK = TYPE | S2AP_R | S2AP_W | AF | 3 << XN_SHIFT     # the bits that tell runs apart in the kernel's text
PAGE = 4096
LAST_LEVEL = 3
CHUNK_ENTRIES = 1 << 20
LEAF_FIELDS = ("pa", "perm", "memattr", "sh")


class State(IntEnum):
    """What a walk finds. INVALID: no mapping. MAPPED: a leaf. RESERVED: valid, but of a type that this level does not
    have. ADDRESS_SIZE: the output, or the next table, is beyond the output size. NO_TABLE: the next table is not in
    memory."""

    INVALID = 0
    MAPPED = 1
    RESERVED = 2
    ADDRESS_SIZE = 3
    NO_TABLE = 4


class DumpError(ValueError):
    """A dump that cannot be read or made; the text names the line or the range."""


def ranges(mem: GuestMemory, cfg: Stage2Config, limit: int = 1 << 24) -> Rows:
    """The whole stage-2 map under ``cfg`` as ``RANGE_DTYPE``; nothing is written.

    ``ValueError`` when stage 2 is off, when every walk under ``cfg`` faults, when there are more than ``limit`` leaves
    or the tables loop.
    """
    from s2shadow.walker import leaves

    if not cfg.enabled:
        raise ValueError("stage 2 is off: there are no tables to dump")
    if cfg.error is not None:
        raise ValueError(f"every walk ends in: {cfg.error}")
    return Scan(mem, cfg, leaves(mem, cfg, limit), limit).run()


def shadow_ranges(vm: NestedVM, index: int, limit: int = 1 << 24) -> Rows:
    """The shadow that an engine built: context ``index`` of ``vm`` as ``RANGE_DTYPE``, in its own (host's) format."""
    from s2shadow.config import Stage2Config
    from s2shadow.memory import GuestMemory

    context = next((context for context in vm.contexts if context.index == index), None)
    if context is None:
        raise ValueError(f"no context {index}")
    addresses, pages = vm.tables(index)
    mem = GuestMemory()
    for address, page in zip(addresses.tolist(), pages, strict=True):
        mem.add(address, buffer=page)
    return ranges(mem, Stage2Config(context.host_vttbr, context.host_vtcr, features=vm.features,
                                    hcr=context.host_hcr), limit)


class Level(NamedTuple):
    """A level of the tables: its number, log2 of the bytes that an entry spans, entries of a table."""

    number: int
    shift: int
    width: int


class Scan:
    """Table by table, one level after the other: what a level does not pass on to the next becomes runs."""

    def __init__(self, mem: GuestMemory, cfg: Stage2Config, leaves: Rows, limit: int):
        self.mem = mem
        self.cfg = cfg
        self.leaves = {name: np.ascontiguousarray(leaves[name]) for name in ("ipa", *LEAF_FIELDS)}
        self.most_entries = self.entries_left = 8 * limit
        self.runs: list[Rows] = []

    def levels(self) -> Iterator[Level]:
        cfg = self.cfg
        assert cfg.start_level is not None
        bits = cfg.granule.bit_length() - 1
        for number in range(cfg.start_level, LAST_LEVEL + 1):
            shift = bits + (bits - 3) * (LAST_LEVEL - number)
            # start tables side by side are one wide table, and a small input space uses a part of one
            yield Level(number, shift, 1 << (cfg.ia_bits - shift if number == cfg.start_level else bits - 3))

    def run(self) -> Rows:
        tables, bases = np.array([self.cfg.baddr], np.uint64), np.zeros(1, np.uint64)
        for level in self.levels():
            self.entries_left -= len(tables) * level.width
            if self.entries_left < 0:
                raise ValueError(f"more than {self.most_entries} table entries, or tables that loop")
            step = max(1, CHUNK_ENTRIES // level.width)
            below = [self.scan(tables[at:at + step], bases[at:at + step], level) for at in range(0, len(tables), step)]
            if not below:
                break
            tables, bases = (np.concatenate(parts) for parts in zip(*below, strict=True))
        found = np.concatenate(self.runs)
        return merge(found[np.argsort(found["start"], kind="stable")], goes_on)

    def scan(self, tables: Words, bases: Words, level: Level) -> tuple[Words, Words]:
        """Note the runs of these tables; the tables below them, and where in the IPA space those start."""
        words, held = self.read(tables, level.width)
        desc, there = words.ravel(), held.ravel()
        ipa = (bases[:, None] + (np.arange(level.width, dtype=np.uint64) << np.uint64(level.shift))).ravel()
        down = np.zeros(len(desc), bool)
        if level.number < LAST_LEVEL:
            down = (desc & TYPE == TYPE) & ~self.too_large(desc, 0)
        self.runs.append(self.runs_of(ipa[~down], desc[~down], there[~down], level))
        return self.output_address(desc[down]), ipa[down]

    def read(self, tables: Words, width: int) -> tuple[Words, npt.NDArray[np.bool_]]:
        """uint64[n, width] of descriptors in host byte order, 0 where memory has none, and where it has one."""
        words = np.zeros((len(tables), width), dtype=">u8" if self.cfg.big_endian else "<u8")
        there = np.ones((len(tables), width), bool)
        piece = min(width, PAGE // 8)       # regions of memory are whole pages
        for i, address in enumerate(tables.tolist()):
            try:
                words[i] = np.frombuffer(self.mem.read(address, width * 8), words.dtype)
            except ValueError:
                for at in range(0, width, piece):
                    part = slice(at, at + piece)
                    try:
                        words[i, part] = np.frombuffer(self.mem.read(address + at * 8, piece * 8), words.dtype)
                    except ValueError:
                        there[i, part] = False
        return words.astype(np.uint64, copy=False), there

    def output_address(self, desc: Words) -> Words:
        """Address bits, 52-bit forms included (``descriptor.output_address`` for arrays)."""
        address = desc & np.uint64((1 << 48) - self.cfg.granule)
        if not self.cfg.wide_output:
            return address
        if self.cfg.granule == 65536:
            return address | (desc & np.uint64(0xF000)) << np.uint64(36)
        return address | desc & np.uint64(3 << 48) | (desc & np.uint64(3 << 8)) << np.uint64(42)

    def too_large(self, desc: Words, shift: int) -> npt.NDArray[np.bool_]:
        """Whether the output, without the bits below its span, is beyond the output size."""
        return self.output_address(desc) >> np.uint64(shift) << np.uint64(shift) >> np.uint64(self.cfg.oa_bits) != 0

    def is_leaf(self, desc: Words, number: int) -> npt.NDArray[np.bool_]:
        """Whether an entry is a leaf that the level may have."""
        if number == LAST_LEVEL:
            return desc & TYPE == TYPE
        if not has_blocks(self.cfg, number):
            return np.zeros(len(desc), bool)
        is_block = desc & TYPE == VALID
        # nT must not be cached, and a shadow is a cache
        return is_block & (desc & NT == 0) if self.cfg.features.bbm else is_block

    def attributes(self, desc: Words) -> Words:
        """Descriptors without output address; of an invalid one, whose bits are software's, what the kernel prints."""
        mask = (1 << 48) - self.cfg.granule
        if self.cfg.wide_output:
            mask |= 0xF000 if self.cfg.granule == 65536 else 3 << 48 | 3 << 8
        return desc & np.where(desc & VALID != 0, np.uint64(~mask & (1 << 64) - 1), np.uint64(KERNEL_MASK))

    def runs_of(self, ipa: Words, desc: Words, there: npt.NDArray[np.bool_], level: Level) -> Rows:
        """Entries as runs; what a leaf means is what the walker says of it."""
        size = np.uint64(1 << level.shift)
        attrs, state, pa = self.attributes(desc), np.full(len(ipa), State.INVALID, np.uint8), np.zeros_like(ipa)
        valid = desc & VALID != 0
        state[valid] = State.RESERVED
        state[self.is_leaf(desc, level.number) & self.too_large(desc, level.shift)] = State.ADDRESS_SIZE
        if level.number < LAST_LEVEL:
            state[desc & TYPE == TYPE] = State.ADDRESS_SIZE     # any other table was followed
        state[~there] = State.NO_TABLE
        leaf, mapped = self.find(ipa, valid)
        state[mapped] = State.MAPPED
        pa[mapped] = self.leaves["pa"][leaf[mapped]]
        first = np.ones(len(ipa), bool)
        first[1:] = ((ipa[1:] - ipa[:-1] != size) | (attrs[1:] != attrs[:-1]) | (state[1:] != state[:-1])
                     | mapped[1:] & (pa[1:] - pa[:-1] != size))
        heads = np.flatnonzero(first)
        rows = blank(len(heads))
        rows["start"], rows["attrs"], rows["state"] = ipa[heads], attrs[heads], state[heads]
        rows["end"] = ipa[np.append(heads[1:], len(ipa)) - 1] + size if len(heads) else 0
        rows["size"], rows["level"] = size, level.number
        mapped = mapped[heads]
        for name in LEAF_FIELDS:
            rows[name][mapped] = self.leaves[name][leaf[heads][mapped]]
        return rows

    def find(self, ipa: Words, valid: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
        """Index of the leaf at each IPA, and whether there is one."""
        leaves = self.leaves["ipa"]
        if not len(leaves):
            return np.zeros(len(ipa), np.intp), np.zeros(len(ipa), bool)
        leaf = np.minimum(np.searchsorted(leaves, ipa), len(leaves) - 1)
        return leaf, valid & (leaves[leaf] == ipa)


def blank(count: int) -> Rows:
    rows = np.zeros(count, dtype=RANGE_DTYPE)
    rows["pa"] = NO_ADDRESS
    rows["memattr"] = rows["sh"] = UNKNOWN
    return rows


def goes_on(before: Rows, after: Rows) -> npt.NDArray[np.bool_]:
    """Whether a run goes on in the next row: same entries, and output addresses in sequence."""
    same = (before["attrs"] == after["attrs"]) & (before["level"] == after["level"])
    same &= before["state"] == after["state"]
    return same & ((before["state"] != State.MAPPED)
                   | (after["pa"] - before["pa"] == after["start"] - before["start"]))


def merge(rows: Rows, same: Callable[[Rows, Rows], npt.NDArray[np.bool_]]) -> Rows:
    """Join rows that touch and of which ``same(before, after)`` says that they are one run."""
    if len(rows) < 2:
        return rows
    first = np.ones(len(rows), bool)
    first[1:] = ~(same(rows[:-1], rows[1:]) & (rows["end"][:-1] == rows["start"][1:]))
    heads = np.flatnonzero(first)
    joined = rows[heads]
    joined["end"] = rows["end"][np.append(heads[1:], len(rows)) - 1]
    return joined


# --- records (JSON, CSV) -------------------------------------------------------------------------------------------

STATES = {State.INVALID: "invalid", State.MAPPED: "mapped", State.RESERVED: "reserved",
          State.ADDRESS_SIZE: "address size", State.NO_TABLE: "no table"}
PERMS = {perm_text(perm): perm for perm in (r | w | x for r in (0, 1) for w in (0, 2) for x in (0, 4, 32, 36))}


def records(rows: Rows) -> list[dict[str, Any]]:
    """One dictionary per range for JSON and CSV; addresses and descriptor bits in hexadecimal text, None: not known."""
    found = []
    for row in rows.tolist():
        start, end, pa, size, attrs, level, state, perm, memattr, sh = row
        mapped = state == State.MAPPED
        found.append({
            "start": f"{start:#x}", "end": f"{end:#x}", "state": STATES[state], "level": level, "size": size or None,
            "perm": perm_text(perm) if mapped else None, "af": attrs >> 10 & 1 if mapped else None,
            "memattr": None if memattr == UNKNOWN else memattr, "sh": None if sh == UNKNOWN else sh,
            "pa": None if pa == NO_ADDRESS else f"{pa:#x}", "attrs": f"{attrs:#x}"})
    return found


def from_records(found: object, name: str = "dump") -> Rows:
    """``RANGE_DTYPE`` of what ``records`` made; ``DumpError`` names the first range that cannot be so."""
    if not isinstance(found, list):
        raise DumpError(f"{name}: ranges must be a list, got {type(found).__name__}")
    rows = blank(len(found))
    end = 0
    for i, record in enumerate(found):
        try:
            row = row_of(record)
        except (KeyError, TypeError, ValueError) as error:
            what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
            raise DumpError(f"{name}: ranges[{i}]: {what}") from None
        if row[0] != end:
            raise DumpError(f"{name}: ranges[{i}] starts at {row[0]:#x}, but the range before it ends at {end:#x}")
        end = row[1]
        rows[i] = row
    known = rows["size"] != 0
    if known.any() and not known.all():
        raise DumpError(f"{name}: ranges[{int(np.argmin(known))}]: size is missing")
    return rows


def row_of(record: object) -> tuple[int, ...]:
    if not isinstance(record, dict):
        raise ValueError(f"must be an object, got {type(record).__name__}")
    start, end, attrs = (hex_number(record, key) for key in ("start", "end", "attrs"))
    if end <= start or (start | end) % PAGE:
        raise ValueError(f"no range of pages: {start:#x} to {end:#x}")
    state = choice(record, "state", {text: state for state, text in STATES.items()})
    mapped = state == State.MAPPED
    size = plain_number(record, "size", 1 << 52, 0)
    if size & (size - 1) or (size and (start | end) % size):
        raise ValueError(f"size {size} is no entry size of the range {start:#x} to {end:#x}")
    perm = choice(record, "perm", PERMS) if mapped else 0
    if mapped and plain_number(record, "af", 1) != attrs >> 10 & 1:
        raise ValueError("af is not what attrs says")
    return (start, end, NO_ADDRESS if record["pa"] is None else hex_number(record, "pa"), size, attrs,
            plain_number(record, "level", LAST_LEVEL, least=-1), state, perm,
            plain_number(record, "memattr", 15, UNKNOWN), plain_number(record, "sh", 3, UNKNOWN))


def hex_number(record: dict[str, Any], key: str) -> int:
    value = record[key]
    try:
        number = int(value, 16)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < 1 << 64 or value != f"{number:#x}":
        raise ValueError(f"{key} must be a hexadecimal number in text, got {value!r}")
    return number


def plain_number(record: dict[str, Any], key: str, most: int, missing: int | None = None, least: int = 0) -> int:
    value = record[key]
    if value is None and missing is not None:
        return missing
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{key} must be a number from {least} to {most}, got {value!r}")
    return value


def choice(record: dict[str, Any], key: str, values: dict[str, int]) -> int:
    value = record[key]
    if not isinstance(value, str) or value not in values:
        raise ValueError(f"{key} must be one of {', '.join(values)}, got {value!r}")
    return values[value]
