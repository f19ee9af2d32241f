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

SL0 = {4096: {3: 3, 2: 0, 1: 1, 0: 2}, 16384: {3: 0, 2: 1, 1: 2}, 65536: {3: 0, 2: 1, 1: 2}}
TG0 = {4096: 0, 65536: 1, 16384: 2}
START = {4096: 1, 16384: 2, 65536: 2}
XN = {4 | 32: 0, 32: 1, 0: 2, 4: 3}
PERMS = {"r": 1, "w": 2, "x": 4 | 32, "p": 4, "u": 32}


def bits_of(perm):
    return sum(PERMS[c] for c in perm if c != "-")


class Tables:
    """One of L1's stage-2 tables. `write` and `read` reach the words; pages come from `pool` upwards."""

    def __init__(self, read, write, pool, granule=PAGE, vtcr=0, big_endian=False, start=None):
        self.read, self.write, self.next = read, write, pool
        self.granule, self.big_endian = granule, big_endian
        self.page_bits = granule.bit_length() - 1
        self.start = START[granule] if start is None else start
        self.ia_bits = self.shift(self.start) + self.page_bits - 3
        self.base = self.new_table()
        self.vtcr = (64 - self.ia_bits) | SL0[granule][self.start] << 6 | TG0[granule] << 14 | 5 << 16 | 1 << 31 | vtcr

    def vttbr(self, vmid=1):
        return self.base | vmid << 48

    def shift(self, level):
        return self.page_bits + (self.page_bits - 3) * (3 - level)

    def size(self, level):
        return 1 << self.shift(level)

    def new_table(self):
        base = -(-self.next // self.granule) * self.granule
        self.next = base + self.granule
        return base

    def get(self, address):
        return self.swap(self.read(address))

    def set(self, address, desc):
        self.write(address, self.swap(desc))

    def swap(self, word):
        return int.from_bytes(word.to_bytes(8, "little"), "big") if self.big_endian else word

    def slot(self, ipa, level):
        """Address of the descriptor for this address at this level; tables are made on the way."""
        table, at = self.base, self.start
        while True:
            index = (ipa >> self.shift(at)) & ((1 << self.page_bits - 3) - 1)
            address = table + 8 * index
            if at == level:
                return address
            desc = self.get(address)
            if desc & 3 != 3:
                desc = self.new_table() | 3
                self.set(address, desc)
            table, at = desc & 0xFFFF_FFFF_FFFF & -self.granule, at + 1

    def leaf(self, cipa, level, perm="rwx", memattr=15, sh=3, af=1, extra=0):
        mask = bits_of(perm)
        kind = 3 if level == 3 else 1
        return cipa | kind | memattr << 2 | (mask & 3) << 6 | sh << 8 | af << 10 | XN[mask & 36] << 53 | extra

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

    def __init__(self, features=None, host=True, vcpus=1, granule=PAGE, vtcr=0, big_endian=False, **options):
        self.mem = s2shadow.GuestMemory()
        self.mem.add(RAM, RAM_SIZE)
        self.rom = bytearray(2 * M)
        self.mem.add(ROM, buffer=self.rom, readonly=True)
        self.mem.add(DEVICE, 2 * M, device=True)
        self.features = features or s2shadow.Features()
        self.vm = s2shadow.NestedVM(self.mem, vcpus=vcpus, features=self.features, **options)
        self.vcpu = self.vm.vcpus[0]
        self.pool = TABLES
        self.tables = self.new_tables(granule, vtcr, big_endian)
        if host:
            self.vm.host.map(RAM, HOST + RAM, RAM_SIZE)
        self.vcpu.load(self.tables.vttbr(), self.tables.vtcr, big_endian=big_endian)

    def new_tables(self, granule=PAGE, vtcr=0, big_endian=False, start=None):
        tables = Tables(self.mem.read64, self.mem.write64, self.pool, granule, vtcr, big_endian, start)
        self.pool += 512 * K
        return tables

    def load(self, vmid=1, tables=None, hcr=HCR_VM, n=0, **options):
        tables = tables or self.tables
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
