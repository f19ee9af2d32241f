"""L1's stage-2 tables, written the way KVM's page-table code writes them.

``GuestRam`` is L1's physical memory as a replay learns about it: RAM regions appear where addresses are first named,
and pages for new tables come from a region of their own. ``Stage2Writer`` keeps one table in it: its methods are the
traced calls (``kvm_pgtable_stage2_map`` and its neighbours), with what they do to neighbours of the range:

- a page mapped inside a block drops the block's other pages (the block is broken before the table is linked);
- a block mapped over a table frees the table;
- an identical leaf, or one that differs in permissions only, is left as it is (KVM leaves those to ``relax``);
- a block partly inside an unmapped range goes whole; tables that become empty are freed.

Table pages live where KVM had them only for the root, whose address is in VTTBR; the others are in no trace.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from s2shadow.config import Stage2Config
from s2shadow.constants import EXEC, EXEC_EL0, HCR_FWB, READ, WRITE

if TYPE_CHECKING:
    from s2shadow.memory import GuestMemory

__all__ = ["GuestRam", "Stage2Writer"]

VALID, TABLE, AF = 1, 2, 1 << 10
S2AP_SHIFT, SH_SHIFT, XN_SHIFT, MEMATTR_SHIFT = 6, 8, 53, 2
WRITE_BIT = 1 << 7
PERMISSIONS = 3 << S2AP_SHIFT | 3 << XN_SHIFT
INNER_SHAREABLE = 3
LAST = 3
# Plain integers: flags that are enum members cost more than what is done with them.
R_W, X, X_EL0 = int(READ | WRITE), int(EXEC), int(EXEC_EL0)
XN_OF = {X | X_EL0: 0, X_EL0: 1, 0: 2, X: 3}
EXEC_OF = {xn: perm for perm, xn in XN_OF.items()}
CHUNK = 64 << 30
MOST_CHUNKS = 256       # a trace may name any address; this much address space is reserved at most
MOST_TABLES = 1 << 16   # of a table that is taken over: one that contains itself has no end
LARGEST_MAP = 4 << 30   # KVM maps a block at a time; more than this is no map
REUSE_AFTER = 256       # a freed table is not reused at once: L1 frees one only after the TLBI that the trace brings


class GuestRam:
    """Regions of a ``GuestMemory`` added as they are needed, and the pages for tables.

    ``limit_bits`` bounds every address (the output size that L1's VTCR allows).
    """

    def __init__(self, mem: GuestMemory, limit_bits: int = 48):
        self.mem = mem
        self.chunk = min(CHUNK, 1 << (limit_bits - 4))
        self.pool = (1 << limit_bits) - 2 * self.chunk
        self.next = self.pool
        self.freed: deque[tuple[int, int]] = deque()
        self.known: set[int] = set()
        mem.add(self.pool, self.chunk)

    def cover(self, address: int, size: int) -> None:
        """Make [address, address + size) RAM. ``ValueError`` where it cannot be."""
        if self.owns(address):
            return
        if address + size > self.pool:
            raise ValueError(f"[{address:#x}, {address + size:#x}) is beyond what L1's tables can reach")
        first, last = address // self.chunk, (address + size - 1) // self.chunk
        for number in range(first, last + 1):
            if number not in self.known:
                if len(self.known) >= MOST_CHUNKS:
                    raise ValueError(f"{address:#x} is one of too many places in memory")
                start = number * self.chunk
                self.fill_gaps(start, start + self.chunk)
                self.known.add(number)

    def fill_gaps(self, start: int, end: int) -> None:
        for region in self.mem.regions:
            if region.start >= end:
                break
            stop = region.start + region.size
            if stop > start:
                if region.start > start:
                    self.mem.add(start, region.start - start)
                start = stop
        if start < end:
            self.mem.add(start, end - start)

    def owns(self, address: int) -> bool:
        """Whether a table page is one that was given out here."""
        return self.pool <= address < self.next

    def new_table(self, size: int) -> int:
        """Address of a zeroed table page."""
        if len(self.freed) > REUSE_AFTER and self.freed[0][1] == size:
            return self.freed.popleft()[0]
        address, self.next = self.next, self.next + size
        if self.next > self.pool + self.chunk:
            raise MemoryError("L1's tables fill their region")
        return address

    def free_table(self, address: int, size: int) -> None:
        """Take a table page back; only those from the pool can be given out again."""
        self.mem.write(address, bytes(size))
        if self.pool <= address < self.pool + self.chunk:
            self.freed.append((address, size))


class Stage2Writer:
    """One stage-2 table of L1: its geometry from ``cfg``, its pages in ``ram``.

    The memory under the root is taken as it is: zeroes for a new VM, or a captured table, whose pages are found by
    walking it once. Addresses are bytes; permissions are masks of ``Access`` bits.
    """

    def __init__(self, ram: GuestRam, cfg: Stage2Config):
        if cfg.error is not None or cfg.start_level is None:
            raise ValueError(f"VTTBR {cfg.vttbr:#x}, VTCR {cfg.vtcr:#x}: {cfg.error}")
        self.ram = ram
        self.mem = ram.mem
        self.cfg = cfg
        self.root = cfg.baddr
        self.granule = cfg.granule
        self.page_bits = cfg.granule.bit_length() - 1
        self.slot_bits = self.page_bits - 3
        self.start = cfg.start_level
        self.ds = bool(cfg.vtcr >> 32 & 1)
        self.shift = {level: self.page_bits + self.slot_bits * (LAST - level) for level in range(self.start, LAST + 1)}
        self.biggest = max(self.start, 1 if self.page_bits == 12 or self.ds else 2)
        self.memattr = 0b0110 if cfg.hcr & HCR_FWB else 0b1111
        # tables[level]: page of the table at that level, by the address bits above it
        self.tables: dict[int, dict[int, int]] = {level: {} for level in range(self.start + 1, LAST + 1)}
        self.empty = bytes(self.granule)
        self.slots_mask = (1 << self.slot_bits) - 1
        self.adopted = 0
        ram.cover(self.root, cfg.granule * cfg.concatenated)
        self.adopt(self.root, self.start, 0)

    def adopt(self, page: int, level: int, prefix: int) -> None:
        """Find the tables that are there already."""
        if level == LAST:
            return
        slots = self.cfg.concatenated << self.slot_bits if level == self.start else 1 << self.slot_bits
        words = np.frombuffer(self.mem.read(page, slots * 8), dtype="<u8")
        for index in np.flatnonzero(words & np.uint64(3) == 3).tolist():
            child = self.address_of(int(words[index]))
            key = prefix << self.slot_bits | index
            self.tables[level + 1][key] = child
            self.adopted += 1
            if self.adopted > MOST_TABLES:
                raise ValueError(f"the table at {self.root:#x} has no end")
            self.ram.cover(child, self.granule)
            self.adopt(child, level + 1, key)

    # --- descriptors -------------------------------------------------------------------------------------------

    def address_bits(self, address: int) -> int:
        """An output address as a descriptor holds it (with DS=1 bits 51:50 sit in 9:8, where SH was)."""
        return address & ~(3 << 50) | (address >> 50 & 3) << SH_SHIFT if self.ds else address

    def address_of(self, desc: int) -> int:
        low = ~(self.granule - 1)
        if self.ds:
            return desc & 0x3_FFFF_FFFF_FFFF & low | (desc >> SH_SHIFT & 3) << 50
        return desc & 0xFFFF_FFFF_FFFF & low

    def attributes(self, perm: int, device: bool) -> int:
        """Everything of a leaf but its address and type."""
        xn = XN_OF[perm & (X | X_EL0)] if self.cfg.features.xnx else 0 if perm & X else 2
        shareability = 0 if self.ds else INNER_SHAREABLE << SH_SHIFT
        memattr = 0b0001 if device else self.memattr
        return AF | (perm & R_W) << S2AP_SHIFT | shareability | xn << XN_SHIFT | memattr << MEMATTR_SHIFT

    def leaf(self, pa: int, level: int, attributes: int) -> int:
        return self.address_bits(pa) | attributes | (VALID | TABLE if level == LAST else VALID)

    # --- walking -----------------------------------------------------------------------------------------------

    def slot(self, page: int, ipa: int, level: int) -> int:
        """Address of the descriptor for ``ipa`` in the table page at ``level``."""
        index = ipa >> self.shift[level]
        return page + 8 * (index if level == self.start else index & self.slots_mask)

    def page_at(self, ipa: int, level: int) -> int | None:
        if level == self.start:
            return self.root
        return self.tables[level].get(ipa >> self.shift[level - 1])

    def find(self, ipa: int) -> tuple[int, int, int]:
        """(level, address of the descriptor, descriptor) where a walk for ``ipa`` ends, valid or not."""
        if ipa >> self.cfg.ia_bits:
            raise ValueError(f"{ipa:#x} is no address of a {self.cfg.ia_bits}-bit stage 2")
        level = LAST
        while True:
            page = self.page_at(ipa, level)
            if page is not None:
                slot = self.slot(page, ipa, level)
                return level, slot, self.mem.read64(slot)
            level -= 1

    def output(self, ipa: int, level: int, desc: int) -> int | None:
        """Where the leaf found at ``level`` maps ``ipa``; None where there is none."""
        return self.address_of(desc) | ipa & (1 << self.shift[level]) - 1 if desc & VALID else None

    def reach(self, ipa: int, level: int) -> int:
        """The table page at ``level`` over ``ipa``, made where there is none; a block in the way is broken."""
        page = self.page_at(ipa, level)
        if page is None:
            above = self.reach(ipa, level - 1)
            page = self.ram.new_table(self.granule)
            self.tables[level][ipa >> self.shift[level - 1]] = page
            self.mem.write64(self.slot(above, ipa, level - 1), self.address_bits(page) | VALID | TABLE)
        return page

    def drop_table(self, ipa: int, level: int) -> None:
        """Free the table at ``level`` over ``ipa`` and what hangs below; the entry above is the caller's."""
        key = ipa >> self.shift[level - 1]
        page = self.tables[level].pop(key, None)
        if page is None:
            return
        if level < LAST and self.tables[level + 1]:
            base = key << self.shift[level - 1]
            for index in range(1 << self.slot_bits):
                self.drop_table(base + (index << self.shift[level]), level + 1)
        self.ram.free_table(page, self.granule)

    def check(self, ipa: int, size: int) -> None:
        if size <= 0 or (ipa | size) & (self.granule - 1) or ipa + size > 1 << self.cfg.ia_bits:
            raise ValueError(f"[{ipa:#x}, {ipa + size:#x}) is no range of a {self.cfg.ia_bits}-bit stage 2 with a "
                             f"{self.granule >> 10}K granule")

    # --- the traced calls --------------------------------------------------------------------------------------

    def map(self, ipa: int, size: int, pa: int, perm: int, device: bool = False) -> None:
        """kvm_pgtable_stage2_map: leaves for [ipa, ipa + size) in the largest blocks that fit."""
        self.check(ipa, size)
        if size > LARGEST_MAP or pa & (self.granule - 1):
            raise ValueError(f"[{pa:#x}, {pa + size:#x}) is no output of a map")
        self.ram.cover(pa, size)
        attributes = self.attributes(perm, device)
        if size == self.granule:
            self.put(ipa, LAST, self.leaf(pa, LAST, attributes))
            return
        end = ipa + size
        while ipa < end:
            level = self.level_for(ipa, pa, end - ipa)
            span = 1 << self.shift[level]
            if level == LAST:
                count = min(end - ipa, self.until_table_ends(ipa)) >> self.page_bits
                self.put_pages(ipa, pa, count, attributes)
                step = count << self.page_bits
            else:
                self.put(ipa, level, self.leaf(pa, level, attributes))
                step = span
            ipa, pa = ipa + step, pa + step

    def level_for(self, ipa: int, pa: int, size: int) -> int:
        level = self.biggest
        while level < LAST and ((ipa | pa) & ((1 << self.shift[level]) - 1) or size < 1 << self.shift[level]):
            level += 1
        return level

    def until_table_ends(self, ipa: int) -> int:
        span = 1 << self.shift[LAST - 1] if self.start < LAST else self.cfg.concatenated << self.shift[LAST - 1]
        return span - (ipa & (span - 1))

    def put(self, ipa: int, level: int, desc: int) -> None:
        page = self.page_at(ipa, level)
        if page is None:
            page = self.reach(ipa, level)
        slot = self.slot(page, ipa, level)
        old = self.mem.read64(slot)
        if not old & VALID:
            self.mem.write64(slot, desc)
        elif level < LAST and old & TABLE:
            self.mem.write64(slot, desc)
            self.drop_table(ipa, level + 1)
        elif (old ^ desc) & ~(PERMISSIONS | AF):
            self.mem.write64(slot, desc)

    def put_pages(self, ipa: int, pa: int, count: int, attributes: int) -> None:
        """``count`` page descriptors of one table, as one piece."""
        slot = self.slot(self.reach(ipa, LAST), ipa, LAST)
        old = np.frombuffer(self.mem.read(slot, count * 8), dtype="<u8")
        first = self.leaf(pa, LAST, attributes)
        new = np.arange(count, dtype=np.uint64) * np.uint64(self.granule) + np.uint64(first)
        keep = (old & np.uint64(1) != 0) & ((old ^ new) & np.uint64(~(PERMISSIONS | AF) & (1 << 64) - 1) == 0)
        self.mem.write(slot, np.where(keep, old, new).astype("<u8").tobytes())

    def unmap(self, ipa: int, size: int) -> None:
        """kvm_pgtable_stage2_unmap."""
        end = ipa + size
        self.check(ipa, size)
        while ipa < end:
            level, slot, desc = self.find(ipa)
            span = 1 << self.shift[level]
            if level == LAST and desc:
                count = min(end - ipa, self.until_table_ends(ipa)) >> self.page_bits
                self.mem.write(slot, bytes(count * 8))
                self.free_empty(ipa)
                ipa += count << self.page_bits
            else:
                if desc:
                    self.mem.write64(slot, 0)
                    self.free_empty(ipa)
                ipa = (ipa | span - 1) + 1

    def free_empty(self, ipa: int) -> None:
        """Free the tables over ``ipa`` that have no entry left."""
        for level in range(LAST, self.start, -1):
            page = self.page_at(ipa, level)
            if page is None:
                continue
            if self.mem.read(page, self.granule) != self.empty:
                return
            above = self.page_at(ipa, level - 1)
            assert above is not None
            self.mem.write64(self.slot(above, ipa, level - 1), 0)
            self.drop_table(ipa, level)

    def relax(self, ipa: int, perm: int) -> bool:
        """kvm_pgtable_stage2_relax_perms: add permissions to the leaf over ``ipa``; False where there is none."""
        _, slot, desc = self.find(ipa)
        if not desc & VALID:
            return False
        given = self.attributes(perm | EXEC_OF[desc >> XN_SHIFT & 3], False)
        new = desc & ~(3 << XN_SHIFT) | given & (3 << XN_SHIFT | 3 << S2AP_SHIFT) | AF
        if new != desc:
            self.mem.write64(slot, new)
        return True

    def mkyoung(self, ipa: int) -> None:
        """kvm_pgtable_stage2_mkyoung: set the access flag."""
        _, slot, desc = self.find(ipa)
        if desc & VALID and not desc & AF:
            self.mem.write64(slot, desc | AF)

    def wrprotect(self, ipa: int, size: int) -> None:
        """kvm_pgtable_stage2_wrprotect: every leaf that overlaps the range loses W."""
        self.check(ipa, size)
        end = ipa + size
        while ipa < end:
            level, slot, desc = self.find(ipa)
            span = 1 << self.shift[level]
            if level == LAST and size > self.granule:
                count = -(-min(end - ipa, self.until_table_ends(ipa)) // self.granule)
                words = np.frombuffer(self.mem.read(slot, count * 8), dtype="<u8")
                self.mem.write(slot, (words & np.uint64(~WRITE_BIT & (1 << 64) - 1)).tobytes())
                ipa += count << self.page_bits
            else:
                if desc & WRITE_BIT and desc & VALID:
                    self.mem.write64(slot, desc & ~WRITE_BIT)
                ipa = (ipa | span - 1) + 1

    def split(self, ipa: int, size: int) -> None:
        """kvm_pgtable_stage2_split: blocks that overlap the range become pages with the same permissions."""
        self.check(ipa, size)
        end = ipa + size
        while ipa < end:
            level, slot, desc = self.find(ipa)
            span = 1 << self.shift[level]
            if level < LAST and desc & 3 == VALID:
                self.split_block(ipa & ~(span - 1), level, slot, desc)
            ipa = (ipa | span - 1) + 1

    def split_block(self, ipa: int, level: int, slot: int, desc: int) -> None:
        pa, attributes = self.address_of(desc), desc & ~self.address_bits(self.address_of(desc)) & ~3
        self.mem.write64(slot, 0)
        for at in range(0, 1 << self.shift[level], 1 << self.shift[LAST - 1]):
            self.put_pages(ipa + at, pa + at, 1 << self.slot_bits, attributes)

    def destroy(self) -> None:
        """kvm_free_stage2_pgd: every table goes, the root is left empty."""
        for level in range(LAST, self.start, -1):
            for page in self.tables[level].values():
                self.ram.free_table(page, self.granule)
            self.tables[level].clear()
        self.mem.write(self.root, bytes(self.granule * self.cfg.concatenated))

    def leaves(self) -> npt.NDArray[np.void]:
        """Every leaf, as ``s2shadow.leaves`` finds them (``LEAF_DTYPE``)."""
        from s2shadow.walker import leaves

        return leaves(self.mem, self.cfg)
