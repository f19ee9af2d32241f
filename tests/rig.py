"""A small machine for the engine's tests: memory, L1's stage-2 tables written word by word, an engine on top."""

import numpy as np

import s2shadow
from s2shadow import HCR_VM

K, M, G = 1 << 10, 1 << 20, 1 << 30
PAGE = 4 * K
RAM, RAM_SIZE = 0x4000_0000, 64 * M
TABLES = RAM  # L1 keeps its tables in the first 2 MiB
DATA = RAM + 2 * M
ROM, DEVICE, NOWHERE = 0x8000_0000, 0x9000_0000, 0xA000_0000
HOST = 0x10_0000_0000  # what the tests add to a cIPA to get a PA

SL0 = {4096: {3: 3, 2: 0, 1: 1, 0: 2, -1: 0}, 16384: {3: 0, 2: 1, 1: 2, 0: 3}, 65536: {3: 0, 2: 1, 1: 2}}
TG0 = {4096: 0, 65536: 1, 16384: 2}
TLBI_TG = {4096: 1, 16384: 2, 65536: 3}
START = {4096: 1, 16384: 2, 65536: 2}
XN = {4 | 32: 0, 32: 1, 0: 2, 4: 3}
PERMS = {"r": 1, "w": 2, "x": 4 | 32, "p": 4, "u": 32}
HA, HD, DS, SL2, S2PIE = 1 << 21, 1 << 22, 1 << 32, 1 << 33, 1 << 36
AF, DIRTY, DBM, CONTIGUOUS = 1 << 10, 1 << 7, 1 << 51, 1 << 52
S2PIR = 0xFEDC_BA98_7654_3210  # each index names the base permission of the same number
MRO = "mro"  # with permission indirection: only the MMU may write
BASE_PERMISSION = {0: 0, 2: 4, 1: 8, 1 | 32: 9, 1 | 4: 10, 1 | 36: 11, 3: 12, 3 | 32: 13, 3 | 4: 14, 3 | 36: 15}


def single(address, granule=None, level=0):
    """Operand of TLBI IPAS2*, with a level hint where there is a granule."""
    return address >> 12 | (TLBI_TG[granule] << 46 | level << 44 if granule else 0)


def span(base, granule, scale=0, num=0, ttl=0):
    """Operand of TLBI RIPAS2*: (num + 1) << (5 * scale + 1) pages from ``base`` on."""
    return TLBI_TG[granule] << 46 | scale << 44 | num << 39 | ttl << 37 | base >> granule.bit_length() - 1


def bits_of(perm):
    return sum(PERMS[c] for c in perm if c != "-")


class Tables:
    """One of L1's stage-2 tables. `write` and `read` reach the words; pages come from `pool` upwards.

    `wide` is the format with 52-bit addresses (VTCR.DS=1, or 64K with FEAT_LPA); S2PIE in `vtcr` makes permissions
    indices into S2PIR. There are 1 << `concatenated` start tables, as far as `limit` bits of IPA need them.
    """

    def __init__(
        self, read, write, pool, granule=PAGE, vtcr=0, big_endian=False, start=None, wide=False, concatenated=0,
        limit=52,
    ):  # fmt: skip
        self.read, self.write, self.next = read, write, pool
        self.granule, self.big_endian, self.wide = granule, big_endian, wide
        self.ds, self.s2pie = wide and granule != 64 * K, bool(vtcr & S2PIE)
        self.page_bits = granule.bit_length() - 1
        self.start = START[granule] if start is None else start
        one_table = self.shift(self.start) + self.page_bits - 3
        self.ia_bits = min(one_table + concatenated, 52 if wide else 48, limit)
        self.base = self.new_table(1 << max(0, self.ia_bits - one_table))
        self.vtcr = (64 - self.ia_bits) | SL0[granule][self.start] << 6 | TG0[granule] << 14 | 1 << 31 | vtcr
        self.vtcr |= (6 if wide else 5) << 16 | self.ds * DS | (self.start == -1) * SL2

    def vttbr(self, vmid=1):
        low = self.base & 0xFFFF_FFFF_FFFF
        return low | self.base >> 48 << 2 | vmid << 48

    def shift(self, level):
        return self.page_bits + (self.page_bits - 3) * (3 - level)

    def size(self, level):
        return 1 << self.shift(level)

    def new_table(self, pages=1):
        align = self.granule * pages
        base = -(-self.next // align) * align
        self.next = base + align
        return base

    def get(self, address):
        return self.swap(self.read(address))

    def set(self, address, desc):
        self.write(address, self.swap(desc))

    def swap(self, word):
        return int.from_bytes(word.to_bytes(8, "little"), "big") if self.big_endian else word

    def slot(self, ipa, level):
        """Address of the descriptor for this address at this level; tables are made on the way."""
        table, at, top = self.base, self.start, self.ia_bits
        while True:
            address = table + 8 * ((ipa & (1 << top) - 1) >> self.shift(at))
            if at == level:
                return address
            desc = self.get(address)
            if desc & 3 != 3:
                desc = self.encode(self.new_table()) | 3
                self.set(address, desc)
            table, top, at = self.decode(desc), self.shift(at), at + 1

    def encode(self, address):
        """The address in the bits that this format has for it."""
        if self.ds:
            return address & (1 << 50) - 1 | (address >> 50) << 8
        return address & (1 << 48) - 1 | (address >> 48) << 12 if self.wide else address

    def decode(self, desc):
        address = desc & 0xFFFF_FFFF_FFFF & -self.granule
        if self.ds:
            return address | (desc >> 48 & 3) << 48 | (desc >> 8 & 3) << 50
        return address | (desc >> 12 & 15) << 48 if self.wide else address

    def leaf(self, cipa, level, perm="rwx", memattr=15, sh=3, af=1, clean=False, extra=0):
        """A leaf's descriptor. `clean`: where W is named, the page is writable-clean."""
        kind = 3 if level == 3 else 1
        desc = self.encode(cipa) | kind | memattr << 2 | af << 10 | extra | (0 if self.ds else sh << 8)
        return desc | (self.indirect(perm, clean) if self.s2pie else self.direct(perm, clean))

    def direct(self, perm, clean):
        mask = bits_of("r" if perm == MRO else perm)
        clean_write = DIRTY ^ DBM if clean and mask & 2 else 0
        return (mask & 3) << 6 ^ clean_write | XN[mask & 36] << 53

    def indirect(self, perm, clean):
        index = 2 if perm == MRO else BASE_PERMISSION[bits_of(perm)]
        return (index & 1) << 6 | (index >> 1 & 1) << 51 | index >> 2 << 53 | (0 if clean else DIRTY)

    def map(self, ipa, cipa, level=3, **fields):
        """Writes one leaf; returns where."""
        address = self.slot(ipa, level)
        self.set(address, self.leaf(cipa, level, **fields))
        return address

    def map_range(self, ipa, cipa, size, level=3, **fields):
        for at in range(0, size, self.size(level)):
            self.map(ipa + at, cipa + at, level, **fields)

    def unmap(self, ipa, level=3):
        self.set(self.slot(ipa, level), 0)


class Rig:
    """Memory of every kind, an engine, one loaded vCPU, and tables of L1 to fill."""

    def __init__(
        self, features=None, host=True, vcpus=1, granule=PAGE, vtcr=0, big_endian=False, wide=False, **options
    ):  # fmt: skip
        self.mem = s2shadow.GuestMemory()
        self.mem.add(RAM, RAM_SIZE)
        self.rom = bytearray(2 * M)
        self.mem.add(ROM, buffer=self.rom, readonly=True)
        self.mem.add(DEVICE, 2 * M, device=True)
        self.features = features or s2shadow.Features()
        self.vm = s2shadow.NestedVM(self.mem, vcpus=vcpus, features=self.features, **options)
        self.vcpu = self.vm.vcpus[0]
        self.pool = TABLES
        self.tables = self.new_tables(granule, vtcr, big_endian, wide=wide)
        if host:
            self.vm.host.map(RAM, HOST + RAM, RAM_SIZE)
        self.load(big_endian=big_endian)

    def new_tables(self, granule=PAGE, vtcr=0, big_endian=False, start=None, wide=False):
        tables = Tables(self.mem.read64, self.mem.write64, self.pool, granule, vtcr, big_endian, start, wide)
        self.pool += 512 * K
        return tables

    def load(self, vmid=1, tables=None, hcr=HCR_VM, n=0, **options):
        tables = tables or self.tables
        options = {"big_endian": tables.big_endian, "s2pir": S2PIR} | options
        return self.vm.vcpus[n].load(tables.vttbr(vmid), tables.vtcr, hcr=hcr, **options)

    def fault(self, ipa, access=s2shadow.READ, n=0):
        return self.vm.vcpus[n].fault(ipa, access)

    def shadow(self, index=0):
        return self.vm.shadow(index)

    def leaves(self, index=0):
        """[(ipa, cipa, size)] of a context."""
        return [(row["ipa"].item(), row["cipa"].item(), row["size"].item()) for row in self.vm.shadow(index)]

    def host_leaves(self):
        """[(cipa, pa, size, perm)] of the host's table."""
        return [tuple(row[n].item() for n in ("cipa", "pa", "size", "perm")) for row in self.vm.host.leaves()]


def flags(bitmap, count):
    """A bitmap of the engine as a list of booleans."""
    return np.unpackbits(np.asarray(bitmap), count=count, bitorder="little").astype(bool).tolist()
