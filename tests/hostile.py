"""A hostile L1 under a busy host, and a judge who trusts the engine with nothing.

``Hostile`` does one thing at a time: L1's edits, registers and TLBIs, L2's accesses, the host's changes. What the host
maps stands in plain arrays beside it, page by page (``Host``). ``verify`` decodes the raw pages of every shadow table
and holds each leaf against those arrays: a leaf that reaches anything that the host does not map now, or allows what it
does not allow now, is a breach. Nothing of the engine is asked but for the bytes of its tables.
"""

import re
import threading

import numpy as np

import s2shadow
from beside import beside
from model import tlbi as book
from rig import AF, CONTIGUOUS, DBM, DIRTY, HD, S2PIE, S2PIR, Tables
from s2shadow import HCR_VM, HIT, HOST_FAULT, L1_FAULT, MAPPED, MMIO, NO_MEMORY, RETRY, HostMapping

K, M = 1 << 10, 1 << 20
BASE = 1 << 32  # of L1's memory
HOST = 1 << 36  # of the host's
TABLE_BYTES = 1 * M  # L1 keeps its tables at BASE
SMALL = 1 * M  # ROM, device
R, W, X, U, MAPPED_BIT = 1, 2, 4, 32, 64
PERM_OF_XN = np.array([X | U, U, 0, X], np.uint8)
HOST_PERMS = ("rwx", "rwx", "rwx", "rw", "rx", "r")
ACCESSES = (1, 1, 1, 2, 2, 2, 3, 4, 4 | 8, 1 | 8, 2 | 8, 1 | 16, 2 | 16, 7)
KINDS = {HIT, MAPPED, L1_FAULT, HOST_FAULT, MMIO, RETRY, NO_MEMORY}
RIGHTS = {"r": R, "w": W, "x": X | U}
DEAD = {"blow-away", "blow-away-lean"}  # drop whole host blocks where a part goes
HCR_BITS = (s2shadow.HCR_PTW, s2shadow.HCR_CD, s2shadow.HCR_FWB)
GUESTS = {4 * K: (4 * K, 16 * K, 64 * K), 16 * K: (16 * K, 64 * K), 64 * K: (64 * K,)}


class Breach(AssertionError):
    """L2 could reach what the host does not give it."""


class Host:
    """What the host maps, by page of a window of L1's memory; what it logs, and what L2 was let write since."""

    def __init__(self, page, pages, pa_pages):
        self.page, self.pages, self.pa_pages = page, pages, pa_pages
        self.pa = np.zeros(pages, np.int64)  # page number from HOST on
        self.perm = np.zeros(pages, np.uint8)  # 0: not mapped
        self.limit = np.full(pages, 0xFF, np.uint8)  # without W where L1 sees ROM
        self.ram = np.zeros(pages, bool)
        self.logged = np.zeros(pages, bool)
        self.written = np.zeros(pages, bool)
        self.changed = True

    def slice(self, start, end):
        self.changed = True
        return slice((start - BASE) // self.page, (end - BASE) // self.page)

    def map(self, start, end, pa, perm):
        part = self.slice(start, end)
        self.pa[part] = (pa - HOST) // self.page + np.arange(part.stop - part.start)
        self.perm[part] = perm | MAPPED_BIT

    def unmap(self, start, end):
        self.perm[self.slice(start, end)] = 0

    def protect(self, start, end, perm):
        part = self.slice(start, end)
        self.perm[part] = np.where(self.perm[part] != 0, perm | MAPPED_BIT, 0)

    def log(self, start, end, on):
        part = self.slice(start, end)
        fresh = self.ram[part] & ~self.logged[part] if on else self.ram[part]
        self.written[part] &= ~fresh
        self.logged[part] = np.where(self.ram[part], on, self.logged[part])

    def now(self):
        """The permissions in force, by page."""
        return self.perm & self.limit & np.where(self.logged & ~self.written, 0xFF ^ W, 0xFF).astype(np.uint8)

    def missing(self):
        """For each permission bit: how many of the first n host pages lack it, for all n."""
        if self.changed:
            allowed = np.zeros(self.pa_pages, np.uint8)
            mapped = np.flatnonzero(self.perm)
            np.bitwise_or.at(allowed, self.pa[mapped], self.now()[mapped])
            self.lacking = {
                bit: np.concatenate([[0], np.cumsum(allowed & bit == 0)]) for bit in (R, W, X, U, MAPPED_BIT)
            }
            self.changed = False
        return self.lacking


def output_address(words, granule, wide):
    if not wide:
        return words & np.uint64((1 << 48) - granule)
    if granule == 64 * K:
        return words & np.uint64((1 << 48) - granule) | (words >> np.uint64(12) & np.uint64(15)) << np.uint64(48)
    return words & np.uint64((1 << 50) - granule) | (words >> np.uint64(8) & np.uint64(3)) << np.uint64(50)


def decode_tables(addresses, pages, vttbr, vtcr, granule, pa_bits):
    """(ipa, pa, size, perm, word) arrays of every leaf, from the raw pages of a table and where it starts."""
    words = pages.view("<u8")
    wide, bits, page_bits = pa_bits == 52, granule.bit_length() - 4, granule.bit_length() - 1
    base, level, roots = where_walks_start(vttbr, vtcr, granule, pa_bits)
    order = np.argsort(addresses)
    addresses = addresses[order]
    at = np.uint64(base) + np.arange(roots, dtype=np.uint64) * np.uint64(granule)
    ipa = np.arange(roots, dtype=np.uint64) << np.uint64(page_bits + bits * (4 - level))
    found = []
    while len(at):
        rows = np.searchsorted(addresses, at)
        if (rows >= len(addresses)).any() or (addresses[rows] != at).any():
            raise Breach("a shadow table points to a page that is not one of its own")
        entries = words[order[rows]]
        row, column = np.nonzero(entries & np.uint64(1))
        entry = entries[row, column]
        shift = page_bits + bits * (3 - level)
        entry_ipa = ipa[row] + (column.astype(np.uint64) << np.uint64(shift))
        is_table = (entry & np.uint64(2) != 0) & (level < 3)
        if level == 3 and (entry & np.uint64(2) == 0).any():
            raise Breach("a reserved descriptor in a shadow")
        leaf = entry[~is_table]
        perm = (leaf >> np.uint64(6) & np.uint64(3)).astype(np.uint8)
        perm |= PERM_OF_XN[(leaf >> np.uint64(53) & np.uint64(3)).astype(np.int64)]
        pa = output_address(leaf, granule, wide) & ~np.uint64((1 << shift) - 1)
        found.append((entry_ipa[~is_table], pa, np.full(len(leaf), 1 << shift, np.uint64), perm, leaf))
        at, ipa, level = output_address(entry[is_table], granule, wide), entry_ipa[is_table], level + 1
    return tuple(np.concatenate(columns) for columns in zip(*found, strict=True))


def shadow_leaves(addresses, pages, vttbr, vtcr, granule, pa_bits):
    """[(pa, size, perm)] of a small table: one entry after the other, as ``decode_tables`` does not."""
    words = pages.view("<u8")
    rows = dict(zip(addresses.tolist(), range(len(addresses)), strict=True))
    base, level, roots = where_walks_start(vttbr, vtcr, granule, pa_bits)
    todo = [(base + n * granule, level) for n in range(roots)]
    wide, page_bits, found = pa_bits == 52, granule.bit_length() - 1, []
    while todo:
        address, level = todo.pop()
        if address not in rows:
            raise Breach(f"a shadow table points to {address:#x}, which is none of its own pages, or twice to one")
        row = words[rows.pop(address)]
        for word in row[np.flatnonzero(row)].tolist():
            output = plain_output_address(word, granule, wide)
            if word & 3 == 3 and level < 3:
                todo.append((output, level + 1))
            elif word & 3 == (3 if level == 3 else 1):
                size = 1 << page_bits + (page_bits - 3) * (3 - level)
                found.append((output & -size, size, word >> 6 & 3 | int(PERM_OF_XN[word >> 53 & 3])))
            else:
                raise Breach(f"{word:#x} in a shadow table")
    return found


def plain_output_address(word, granule, wide):
    if not wide:
        return word & (1 << 48) - granule
    if granule == 64 * K:
        return word & (1 << 48) - granule | (word >> 12 & 15) << 48
    return word & (1 << 50) - granule | (word >> 8 & 3) << 50


def where_walks_start(vttbr, vtcr, granule, pa_bits):
    """(address, level, how many tables side by side)."""
    page_bits, bits, sl0 = granule.bit_length() - 1, granule.bit_length() - 4, vtcr >> 6 & 3
    level = (2 - sl0) if granule == 4 * K else 3 - sl0
    roots = 1 << max(0, 64 - (vtcr & 63) - page_bits - bits * (4 - level))
    return vttbr & (1 << 48) - 64 | (vttbr >> 2 & 15) << 48 if pa_bits == 52 else vttbr & (1 << 48) - 1, level, roots


class Hostile:
    """One machine. Every operation takes the random numbers that it uses."""

    def __init__(self, rng, host_granule=4 * K, teardown=None, tight=None, pa_bits=None, populate=None, vcpus=2):
        self.page = page = host_granule
        self.block = block = page * (page // 8)
        self.pa_bits = pa_bits or rng.choice((40, 48, 48, 52))
        xnx = rng.random() < 0.7
        self.features = s2shadow.Features(
            pa_bits=self.pa_bits, host_granule=page, granules=GUESTS[page], lpa=self.pa_bits == 52,
            lpa2=self.pa_bits == 52 or rng.random() < 0.3, xnx=xnx, fwb=rng.random() < 0.5,
            hafdbs=rng.choice((0, 1, 2)), bbm=rng.random() < 0.3, ttl=rng.random() < 0.8,
            s2pie=xnx and rng.random() < 0.5,
        )  # fmt: skip
        self.mem = s2shadow.GuestMemory()
        self.buffer = np.zeros(2 * block // 8, np.uint64)
        self.ram_end, self.rom, self.device = BASE + 2 * block, BASE + 2 * block, BASE + 3 * block
        self.mem.add(BASE, buffer=self.buffer)
        self.mem.add(self.rom, buffer=np.zeros(SMALL, np.uint8), readonly=True)
        self.mem.add(self.device, SMALL, device=True)
        self.host = Host(page, (3 * block + SMALL) // page, 4 * block // page)
        ram, rom = self.host.slice(BASE, self.ram_end), self.host.slice(self.rom, self.rom + SMALL)
        self.host.ram[ram] = self.host.ram[rom] = True
        self.host.limit[rom] = 0xFF ^ W
        self.teardown = teardown or rng.choice(("reverse-map",) * 6 + ("interval-map", "blow-away", "blow-away-lean"))
        options = {
            "vcpus": vcpus, "contexts": vcpus + rng.randrange(1, 3), "features": self.features,
            "teardown": self.teardown, "tlbi": rng.choice(("exact", "exact", "kvm72")),
            "attributes": rng.choice(("architectural", "kvm72")), "track_tlbis": rng.random() < 0.7,
        }  # fmt: skip
        self.bound = None
        if rng.random() < 0.4 if tight is None else tight:
            self.bound = least_table_bytes(self.mem, options) + rng.randrange(0, 40) * page
        self.vm = s2shadow.NestedVM(self.mem, max_table_bytes=self.bound, **options)
        self.lossy = bool(self.bound)  # host blocks may go where no table for a split can be had
        if rng.random() < 0.3 if populate is None else populate:
            self.vm.host.populate = self.populate
            self.lossy = True
        self.rng = rng  # of the operation under way, for ``populate``
        self.asked = self.host_touched = False
        self.build_tables(rng)
        self.host_map_all(rng)
        self.loaded = {}
        for vcpu in self.vm.vcpus:
            self.load(rng, vcpu)

    # L1's tables

    def build_tables(self, rng):
        """Two tables that make sense, for a while."""
        self.buffer[: TABLE_BYTES // 8] = 0
        self.tables, pool = [], BASE
        for _ in range(2):
            granule = rng.choice(self.features.granules)
            wide = self.pa_bits == 52 and granule == 64 * K
            vtcr = rng.choice((0, 1 << 21, 1 << 21 | HD)) | rng.choice((0, S2PIE) if self.features.s2pie else (0,))
            tables = Tables(self.read, self.write, pool, granule, vtcr, rng.random() < 0.2, wide=wide,
                            limit=min(self.pa_bits, 48))  # fmt: skip
            self.tables.append(tables)
            pool += TABLE_BYTES // 2
            tables.end = pool
            tops = (0, 2 * M, 32 * M, 512 * M, 1 << 30, (1 << tables.ia_bits) - 16 * granule)
            tables.ipas = [top + n * granule for top in tops for n in range(8)]
        for tables in self.tables:
            for ipa in tables.ipas:
                self.map_leaf(rng, tables, ipa, 3, self.data_page(rng))

    def read(self, address):
        return int(self.buffer[self.word_at(address)])

    def write(self, address, value):
        self.buffer[self.word_at(address)] = value

    def word_at(self, address):
        if not BASE <= address < self.ram_end:
            raise ValueError("L1's own table leads out of its RAM")
        return (address - BASE) // 8

    def data_page(self, rng):
        """Mostly a few pages of RAM; sometimes L1's own tables, ROM, a device, or nothing."""
        few = (BASE + 2 * M + rng.randrange(8) * self.page) & -self.page
        return rng.choice((
            few, few, few, few, BASE + self.block + rng.randrange(self.block // self.page) * self.page,
            BASE + rng.randrange(TABLE_BYTES) & -self.page, self.rom + rng.randrange(SMALL) & -self.page,
            self.device + rng.randrange(SMALL) & -self.page, rng.getrandbits(self.pa_bits) & -self.page,
        ))  # fmt: skip

    def map_leaf(self, rng, tables, ipa, level, cipa):
        extra = rng.choice((0, 0, 0, CONTIGUOUS, DBM, DIRTY, 1 << 16))
        fields = {"perm": rng.choice(("rwx", "rwx", "rwx", "rw", "rx", "r", "w", "")), "af": int(rng.random() < 0.9)}
        if tables.next >= tables.end - 4 * tables.granule:
            tables.next = tables.base + tables.granule * 16  # over what is there: contradictory tables
        try:
            tables.map(ipa, cipa & -tables.size(level), level, memattr=rng.choice((15, 15, 15, 5, 1)), extra=extra,
                       **fields)  # fmt: skip
        except ValueError:
            pass  # what it made of its tables before

    def l1_map(self, rng):
        tables = rng.choice(self.tables)
        self.map_leaf(rng, tables, rng.choice(tables.ipas), rng.choice((3, 3, 3, 3, 2, 2, 1)), self.data_page(rng))

    def l1_map_run(self, rng):
        """The same page or the same few, all over."""
        tables, cipa = rng.choice(self.tables), self.data_page(rng)
        for ipa in rng.sample(tables.ipas, 8):
            self.map_leaf(rng, tables, ipa, 3, cipa)

    def evil_word(self, rng):
        """A descriptor of some kind, that may lead anywhere."""
        tables = rng.choice(self.tables)
        target = rng.choice((
            tables.base, BASE + rng.randrange(TABLE_BYTES) & -tables.granule, self.data_page(rng), self.data_page(rng),
            self.rom, self.device, rng.getrandbits(52) & -4096, 0,
        ))  # fmt: skip
        attributes = rng.choice((0x7FC | DIRTY, 0x7FC, AF | rng.getrandbits(12) & 0xFFC, rng.getrandbits(64) & -4))
        word = target & (1 << 48) - 1 | attributes & 0xFFF | rng.choice((3, 3, 3, 1, 1, 0, 2))
        if rng.random() < 0.2:
            word |= attributes & 0xFFF << 52
        return rng.getrandbits(64) if rng.random() < 0.1 else tables.swap(word)

    def evil_slot(self, rng):
        tables = rng.choice(self.tables)
        used = max(1, min(tables.next, tables.end) - tables.base)
        return (tables.base + rng.randrange(used) & -8) - BASE >> 3

    def l1_scribble(self, rng):
        for _ in range(rng.randrange(1, 6)):
            self.buffer[self.evil_slot(rng)] = self.evil_word(rng)

    def l1_loop(self, rng):
        """A whole table of entries that point to itself, or all to one page."""
        tables = rng.choice(self.tables)
        at = tables.base + rng.randrange(max(1, tables.next - tables.base)) & -tables.granule
        if at + tables.granule <= self.ram_end:
            word = tables.swap(rng.choice((at | 0x7FF, self.data_page(rng) | 0x7FF)))
            self.buffer[(at - BASE) // 8 : (at - BASE + tables.granule) // 8] = word

    def l1_rebuild(self, rng):
        self.build_tables(rng)

    # Registers, accesses, TLBIs

    def registers(self, rng):
        tables = rng.choice(self.tables)
        vttbr, vtcr, hcr = tables.vttbr(rng.randrange(1, 4)), tables.vtcr, HCR_VM
        if rng.random() < 0.1:
            vttbr ^= rng.choice((1, 1 << rng.randrange(64), rng.getrandbits(64)))
        if rng.random() < 0.1:
            vtcr ^= rng.choice((1 << rng.randrange(40), rng.getrandbits(40), rng.getrandbits(64)))
        if rng.random() < 0.1:
            hcr = rng.choice((0, s2shadow.HCR_DC, *(HCR_VM | bit for bit in HCR_BITS), rng.getrandbits(64)))
        return {"vttbr": vttbr, "vtcr": vtcr, "hcr": hcr}, tables

    def vcpu(self, rng):
        return rng.choice(self.vm.vcpus)

    def load(self, rng, vcpu=None):
        vcpu = vcpu or self.vcpu(rng)
        registers, tables = self.registers(rng)
        s2pir = rng.choice((S2PIR, S2PIR, rng.getrandbits(64)))
        vcpu.load(**registers, big_endian=tables.big_endian ^ (rng.random() < 0.05), s2pir=s2pir)
        self.loaded[vcpu.index] = self.tables.index(tables)

    def put(self, rng):
        vcpu = self.vcpu(rng)
        vcpu.put()
        self.load(rng, vcpu)

    def ipa(self, rng, vcpu=None):
        """Mostly one that the table of this vCPU maps, or did."""
        tables = self.tables[self.loaded[vcpu.index]] if vcpu and rng.random() < 0.9 else rng.choice(self.tables)
        ipa = rng.choice(tables.ipas) + rng.choice((0, 0, 0, rng.randrange(tables.granule)))
        return rng.choice((ipa, ipa, ipa, ipa, ipa, ipa, ipa, BASE + rng.randrange(3 * self.block),
                           rng.getrandbits(rng.choice((20, 30, 40, 48, 64)))))  # fmt: skip

    def fault(self, rng):
        vcpu, access = self.vcpu(rng), rng.choice(ACCESSES)
        ipa, self.rng = self.ipa(rng, vcpu), rng
        try:
            f = vcpu.fault(ipa, access)
        except MemoryError:
            assert self.bound
            return
        self.judge(np.array([(f.kind, f.cipa, f.pa, f.size, f.ipa)], ANSWER), np.array([access], np.uint8))

    def batch(self, rng, count=12):
        self.rng, vcpu = rng, self.vcpu(rng)
        ipas = np.array([self.ipa(rng, vcpu) for _ in range(rng.randrange(1, count))], np.uint64)
        self.touch(vcpu, ipas, np.array([rng.choice(ACCESSES) for _ in ipas], np.uint8))

    def judge(self, got, masks, steady=True):
        """Each access that was let through is one that the host allows, to where the host says."""
        kinds = got["kind"]
        assert set(kinds.tolist()) <= (KINDS if self.bound else KINDS - {NO_MEMORY})
        done = (kinds == HIT) | (kinds == MAPPED)
        if not done.any() or not steady:
            return
        index = (got["cipa"][done].astype(np.int64) - BASE) // self.page
        if (index < 0).any() or (index >= self.host.pages).any():
            raise Breach("an access was let through to what is no memory of L1's")
        masks = masks[done]
        writes = (masks & W) != 0
        if writes.any() and self.host.logged.any():
            self.host.written[index[writes]] |= self.host.logged[index[writes]]
            self.host.changed = True
        allowed = (self.host.perm & self.host.limit)[index]
        need = masks & (R | W)
        execute = np.where(masks & 8, U, X).astype(np.uint8)
        need |= np.where(masks & X, execute, 0).astype(np.uint8)
        right = HOST + self.host.pa[index] * self.page + (got["cipa"][done].astype(np.int64) & self.page - 1)
        if (need & ~allowed).any() or (got["pa"][done].astype(np.int64) != right).any():
            if not self.asked:  # where populate was called in between, only what is left can be judged
                raise Breach("an access was let through that the host does not allow")

    def aliases(self, rng):
        """Everything that L1 has mapped, at once."""
        vcpu, access = self.vcpu(rng), rng.choice((1, 2))
        ipas, self.rng = np.array(self.tables[self.loaded[vcpu.index]].ipas, np.uint64), rng
        self.touch(vcpu, ipas, access)

    def touch(self, vcpu, ipas, access):
        """One batch, judged; ``access`` is one mask or one for each."""
        try:
            got = vcpu.fault_many(ipas, access)
        except MemoryError:  # from populate
            assert self.bound
            return
        self.judge(got, np.full(len(ipas), access, np.uint8))

    def alias_table(self, rng):
        """One page under each address of one of L1's last-level tables; a thousand at most are touched."""
        vcpu, access = self.vcpu(rng), rng.choice((1, 2))
        tables, self.rng = self.tables[self.loaded[vcpu.index]], rng
        ipa = rng.choice(tables.ipas) & -tables.size(2)
        try:
            first = self.word_at(tables.slot(ipa, 3))
        except ValueError:
            return
        count = tables.granule // 8
        self.buffer[first : first + count] = tables.swap(tables.leaf(self.data_page(rng) & -tables.granule, 3))
        ipas = np.uint64(ipa) + np.arange(min(count, 1024), dtype=np.uint64) * np.uint64(tables.granule)
        self.touch(vcpu, ipas, access)

    def translate(self, rng):
        vcpu = self.vcpu(rng)
        vcpu.translate(self.ipa(rng, vcpu), rng.choice(ACCESSES))

    def operand(self, rng):
        ipa = self.ipa(rng)
        return rng.choice((
            rng.getrandbits(64), rng.getrandbits(64), ipa >> 12 & (1 << 36) - 1, ipa >> 12 | rng.getrandbits(28) << 36,
            ipa >> 14 & (1 << 36) - 1 | rng.getrandbits(27) << 37, 0, (1 << 64) - 1,
        ))  # fmt: skip

    def tlbi(self, rng):
        """Any operation that exists, with any operand, under any registers."""
        op = rng.choice(OPERATIONS)
        if op.scope != "IPA" and rng.random() < 0.7:
            op = rng.choice(BY_IPA)         # the others are many and take everything
        registers = {} if rng.random() < 0.5 else self.registers(rng)[0]
        name = rng.choice((op.name, op.encoding, op.word))
        lacking = book.lacking(op, self.features)
        try:
            self.vcpu(rng).tlbi(name, self.operand(rng), **registers)
            assert not lacking
        except s2shadow.UndefinedInstruction:
            assert lacking

    def tlbi_nonsense(self, rng):
        """SYS words at random."""
        try:
            self.vcpu(rng).tlbi(0xD508_8000 | rng.getrandbits(12) | rng.getrandbits(3) << 16, self.operand(rng))
        except s2shadow.UndefinedInstruction:
            pass

    def tlbi_many(self, rng):
        ops = np.zeros(rng.randrange(1, 20), s2shadow.TLBI_OP_DTYPE)
        for row in ops:
            registers = self.registers(rng)[0]
            op = rng.choice([op for op in OPERATIONS if not book.lacking(op, self.features)])
            row["vcpu"], row["flags"], row["insn"] = rng.randrange(len(self.vm.vcpus)), rng.getrandbits(1), op.word
            row["xt"], row["vttbr"], row["vtcr"] = self.operand(rng), registers["vttbr"], registers["vtcr"]
            row["hcr"] = registers["hcr"]
        self.vm.tlbi_many(ops)

    # At once

    def raced(self, rng, victim):
        """``victim`` runs while another thread rewrites L1's tables."""
        slots = np.array([self.evil_slot(rng) for _ in range(64)])
        words = np.array([self.evil_word(rng) for _ in range(64)], np.uint64)

        def scribble():
            self.buffer[slots] = words
            self.buffer[slots] = np.roll(words, 7)

        with beside(scribble):
            victim()

    def raced_faults(self, rng):
        vcpu, access = self.vcpu(rng), rng.choice((1, 2, 4))
        ipas, self.rng = np.array([self.ipa(rng, vcpu) for _ in range(20)] * 30, np.uint64), rng
        self.raced(rng, lambda: self.touch(vcpu, ipas, access))

    def raced_host(self, rng):
        """L2 runs on one vCPU while the host changes what is under it."""
        if self.vm.host.populate:
            return
        vcpu, access = self.vm.vcpus[0], rng.choice((1, 2))
        ipas = np.array([self.ipa(rng, vcpu) for _ in range(20)] * 20, np.uint64)
        writes = []

        def run():
            got = vcpu.fault_many(ipas, access)
            self.judge(got, np.full(len(ipas), access, np.uint8), steady=False)
            if access == W:
                writes.append(got["cipa"][(got["kind"] == HIT) | (got["kind"] == MAPPED)])

        thread = threading.Thread(target=run)
        thread.start()
        try:
            for _ in range(3):
                rng.choice((self.unmap, self.host_map, self.protect))(rng)
        finally:
            thread.join()
        if writes:
            index = (writes[0].astype(np.int64) - BASE) // self.page
            self.host.written[index] |= self.host.logged[index]
            self.host.changed = True

    # The host

    def range(self, rng):
        self.host_touched = True
        first = rng.choice((rng.randrange(self.host.pages), (2 * M // self.page) + rng.randrange(8)))
        count = min(rng.choice((1, 1, 1, 2, 8, 32, self.block // self.page)), self.host.pages - first)
        return BASE + first * self.page, BASE + (first + count) * self.page

    def populate(self, cipa, access):
        """A page at a time, always another one; and it calls the engine back."""
        if self.rng.random() < 0.1:
            return None
        if self.rng.random() < 0.1:
            self.unmap(self.rng)
        self.asked = self.host_touched = True
        pa, perm = HOST + self.rng.randrange(self.host.pa_pages) * self.page, self.rng.choice(HOST_PERMS)
        start = cipa & -self.page
        self.host.map(start, start + self.page, pa, self.rights(perm))
        return HostMapping(pa, self.page, perm)

    def rights(self, perm):
        return sum(RIGHTS[c] for c in perm)

    def host_map_all(self, rng):
        self.host_touched = True
        for start, end in ((BASE, self.ram_end), (self.rom, self.rom + SMALL)):
            pa = HOST + rng.choice((0, self.block, 2 * self.block))
            self.try_map(start, end, pa, "rwx")

    def host_map(self, rng):
        start, end = self.range(rng)
        if rng.random() < 0.3:  # where blocks fit
            start &= -self.block
            end = start + self.block if start < BASE + 3 * self.block else start + SMALL
        room = self.host.pa_pages - (end - start) // self.page
        pa = HOST + rng.choice((rng.randrange(room + 1), (start - BASE) // self.page % (room + 1))) * self.page
        if start % self.block == 0 and rng.random() < 0.7:
            pa = pa - HOST & -self.block | HOST
        self.try_map(start, end, pa, rng.choice(HOST_PERMS))

    def try_map(self, start, end, pa, perm):
        try:
            self.vm.host.map(start, pa, end - start, perm)
        except MemoryError:
            assert self.bound  # and then nothing is changed, which verify() sees
        else:
            self.host.map(start, end, pa, self.rights(perm))

    def unmap(self, rng):
        start, end = self.range(rng)
        partial = rng.choice(("split", "split", None, "drop"))
        drops = partial == "drop" or (partial is None and self.teardown in DEAD)
        self.vm.unmap(start, end, partial)
        self.host.unmap(start, end)
        if drops:
            self.adopt()

    def protect(self, rng):
        start, end = self.range(rng)
        perm = rng.choice(HOST_PERMS)
        self.vm.host.protect(start, end, perm)
        self.host.protect(start, end, self.rights(perm))

    def log_dirty(self, rng):
        start, end = rng.choice((self.range(rng), (BASE, self.ram_end)))
        on = rng.random() < 0.7
        self.vm.log_dirty(start, end, on)
        self.host.log(start, end, on)

    def dirty_log(self, rng):
        """No write that was let through is missing."""
        start, end = rng.choice((self.range(rng), (BASE, self.ram_end)))
        bitmap = self.vm.dirty_log(start, end)
        part = self.host.slice(start, end)
        reported = np.unpackbits(bitmap, count=part.stop - part.start, bitorder="little").astype(bool)
        if (self.host.written[part] & ~reported).any():
            raise Breach("a write was let through and is not in the dirty log")
        self.host.written[part] = False

    def age(self, rng):
        start, end = self.range(rng)
        (self.vm.age if rng.random() < 0.7 else self.vm.test_young)(start, end)

    def take_tlbis(self, rng):
        self.vm.take_tlbis(rng.choice((None, 1, 100)))

    # The judge

    def canonical(self):
        """The host's table, decoded: (mapped, pa, perm, W granted) by page of the window."""
        context = self.vm.contexts[0]
        addresses, pages = self.vm.tables(None)
        root = int(addresses[0])
        vtcr = canonical_vtcr(self.page, self.pa_bits)
        vttbr = root if self.pa_bits < 52 else root & (1 << 48) - 1 | root >> 48 << 2
        assert context.host_vmid > 1
        ipa, pa, size, perm, word = decode_tables(addresses, pages, vttbr, vtcr, self.page, self.pa_bits)
        mapped = np.zeros(self.host.pages, bool)
        where, rights = np.zeros(self.host.pages, np.int64), np.zeros(self.host.pages, np.uint8)
        counts = (size // np.uint64(self.page)).astype(np.int64)
        steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        index = np.repeat((ipa.astype(np.int64) - BASE) // self.page, counts) + steps
        mapped[index] = True
        where[index] = np.repeat((pa.astype(np.int64) - HOST) // self.page, counts) + steps
        granted = perm | np.where(word >> np.uint64(58) & np.uint64(1), W, 0).astype(np.uint8)
        rights[index] = np.repeat(granted, counts)
        return mapped, where, rights

    def adopt(self):
        """Where the host may have lost more than it asked for: what is left must be what was there."""
        mapped, where, rights = self.canonical()
        ours = self.host.perm != 0
        if (mapped & ~ours).any():
            raise Breach("the host's table maps what the host does not")
        if (where[mapped] != self.host.pa[mapped]).any() or (rights[mapped] != self.host.perm[mapped] & 0x3F).any():
            raise Breach("the host's table differs from what the host said")
        self.host.perm[~mapped] = 0
        self.host.changed = True

    def verify_host(self):
        if not self.lossy:
            mapped, where, rights = self.canonical()
            ours = self.host.perm != 0
            if (mapped != ours).any() or (where[mapped] != self.host.pa[mapped]).any():
                raise Breach("the host's table differs from what the host said")
            if (rights[mapped] != self.host.perm[mapped] & 0x3F).any():
                raise Breach("the host's table allows what the host did not say")
        else:
            self.adopt()
        self.asked = self.host_touched = False

    def scan(self):
        """Every leaf of every shadow against what the host maps now; how many leaves there are."""
        total = 0
        lacking = self.host.missing()
        for context in self.vm.contexts:
            addresses, pages = self.vm.tables(context.index)
            vttbr, vtcr = context.host_vttbr, context.host_vtcr
            leaves = shadow_leaves(addresses, pages, vttbr, vtcr, self.page, self.pa_bits)
            for pa, size, perm in leaves:
                first, last = (pa - HOST) // self.page, (pa + size - HOST) // self.page
                if first < 0 or last > self.host.pa_pages:
                    raise Breach(f"a leaf reaches {pa:#x}, which the host never gave")
                for bit, count in lacking.items():
                    if (perm | MAPPED_BIT) & bit and count[last] != count[first]:
                        raise Breach(f"a leaf at {pa:#x} allows what the host does not (permission bit {bit})")
            total += len(leaves)
        return total

    def verify(self, check=True):
        if self.host_touched or (self.bound and self.host.logged.any()):
            self.verify_host()
        stats = self.vm.stats
        assert self.scan() == stats.live
        assert self.bound is None or stats.memory_bytes <= self.bound
        if check:
            self.vm.check()

    def end(self):
        """With everything unmapped, nothing is left."""
        self.vm.host.populate = None  # which holds on to this machine
        self.vm.unmap(BASE, BASE + self.host.pages * self.page)
        self.host.unmap(BASE, BASE + self.host.pages * self.page)
        self.verify()
        stats = self.vm.stats
        assert (stats.live, stats.memory_bytes - stats.rmap_bytes) == (0, 0)


def least_table_bytes(mem, options):
    """The smallest bound that is accepted, as the refusal of a smaller one says."""
    try:
        s2shadow.NestedVM(mem, max_table_bytes=1, **options)
    except ValueError as refusal:
        return int(re.search(r"at least (\d+)", str(refusal))[1])
    raise AssertionError("a bound of one byte was accepted")


def canonical_vtcr(granule, pa_bits):
    """T0SZ and SL0 of a table for the whole space, concatenated as far as it goes: all that the decoder looks at."""
    page_bits = granule.bit_length() - 1
    level, bits = (1 if granule == 4 * K else 2), page_bits - 3
    if pa_bits == 52 and pa_bits > page_bits + bits * (4 - level):
        level -= 1
    while pa_bits > page_bits + bits * (4 - level) + 4:
        level -= 1
    return 64 - pa_bits | (2 - level if granule == 4 * K else 3 - level) << 6


ANSWER = np.dtype([("kind", "u1"), ("cipa", "u8"), ("pa", "u8"), ("size", "u8"), ("ipa", "u8")])
BY_IPA = [op for op in book.OPERATIONS.values() if op.scope == "IPA"]
OPERATIONS = sorted(book.OPERATIONS.values(), key=lambda op: op.name)
WEIGHTS = {
    "fault": 200, "batch": 80, "aliases": 30, "alias_table": 1, "translate": 10, "load": 60, "put": 6, "l1_map": 80,
    "l1_map_run": 20, "l1_scribble": 60, "l1_loop": 4, "l1_rebuild": 10, "tlbi": 60, "tlbi_nonsense": 6, "tlbi_many": 6,
    "raced_faults": 6, "raced_host": 4, "host_map": 14, "host_map_all": 5, "unmap": 20, "protect": 16, "log_dirty": 8,
    "dirty_log": 12, "age": 12, "take_tlbis": 6,
}  # fmt: skip
