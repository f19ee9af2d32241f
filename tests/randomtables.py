"""Random tables of L1 over a random host, dense and built with NumPy, for a walker that is not ours to compare with.

Everything is well formed in the points in which that walker departs from the architecture (oracle.py lists them): no
block at a level that forbids it, no stray address bit in a block, contiguous groups that agree, no reserved MemAttr.
All else is random: start level, concatenation, byte order, output size, types, permissions, AF, MemAttr, SH, XN, and
the bits that hardware ignores.
"""

from dataclasses import dataclass

import numpy as np

import rig

K, M, G = 1 << 10, 1 << 20, 1 << 30
MEMATTRS = np.array([0, 1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15], np.uint64)  # not reserved without FWB
PERMS = ("rwx", "rwx", "rwx", "rw", "rw", "rx", "r", "w", "wx", "x", "-")
TG0 = rig.TG0
SL0 = {4 * K: {2: 0, 1: 1, 0: 2}, 16 * K: {3: 0, 2: 1, 1: 2}, 64 * K: {3: 0, 2: 1, 1: 2}}  # without FEAT_TTST
BLOCKS = {4 * K: (1, 2), 16 * K: (2,), 64 * K: (2,)}
CONTIGUOUS = {4 * K: {3: 16, 2: 16, 1: 16}, 16 * K: {3: 128, 2: 32}, 64 * K: {3: 32, 2: 32}}
PS_BITS = (32, 36, 40, 42, 44, 48)
IGNORED = 0xFF88_0000_0000_0800  # bits 63:55 and 51 without S2PIE and HAFDBS, FnXS
TABLE_IGNORED = 0xFFF8_0000_0000_0FFC

SLOT_DTYPE = np.dtype(
    [("ipa", "u8"), ("oa", "u8"), ("address", "u8"), ("desc", "u8"), ("level", "i1"), ("contiguous", "?")]
)


def start_levels(granule, pa_bits):
    """[(start level, input bits)] that L1 may use: spec 01, section 4, with T0SZ <= 39 and IA <= PA size."""
    page = granule.bit_length() - 1
    found = []
    for level in SL0[granule]:
        shift = page + (page - 3) * (3 - level)
        if level == {4 * K: 0, 16 * K: 1, 64 * K: 1}[granule] and pa_bits < (42 if granule == 16 * K else 44):
            continue
        found += [(level, ia) for ia in range(max(25, shift + 1), min(pa_bits, shift + page + 1) + 1)]
    return found


class Extents:
    """Ranges of addresses to aim at."""

    def __init__(self, pairs):
        pairs = np.array(sorted(pairs), np.uint64).reshape(-1, 2)
        self.starts, self.ends = pairs[:, 0], pairs[:, 1]

    def pick(self, rng, count):
        """Random addresses inside random extents."""
        n = rng.integers(0, len(self.starts), count)
        return rng.integers(self.starts[n], self.ends[n], dtype=np.uint64)

    def inside(self, rng, starts, span):
        """For each [start, start + span) a random address of some extent in it; anywhere in it where there is none."""
        low = np.searchsorted(self.ends, starts, "right")
        high = np.searchsorted(self.starts, starts + span, "left")
        n = rng.integers(low, np.maximum(high, low + 1)).clip(max=len(self.starts) - 1)
        first, last = np.maximum(self.starts[n], starts), np.minimum(self.ends[n], starts + span)
        missed = last <= first
        return rng.integers(np.where(missed, starts, first), np.where(missed, starts + span, last), dtype=np.uint64)


@dataclass(frozen=True)
class Region:
    """A piece of L1's memory, and by what unit the host maps it."""

    start: int
    size: int
    unit: int
    device: bool = False


class HostMap:
    """Fills the host's table at random, in runs of each region's unit with holes between."""

    def __init__(self, rng, vm, regions, pas):
        self.rng, self.vm, self.pas = rng, vm, pas
        self.page = vm.features.host_granule
        runs = [run for region in regions for run in self.runs(region)]
        for start, end in runs:
            self.map(start, end - start)
        self.extents = Extents(runs)

    def runs(self, region):
        """[(start, end)]: two thirds of the region."""
        unit = max(region.unit, self.page)
        at, found = region.start, []
        while at < region.start + region.size:
            end = min(at + unit * int(self.rng.integers(1, 33)), region.start + region.size)
            if self.rng.random() < 0.67:
                found.append((at, end))
            at = end
        return found

    def map(self, start, size):
        """Maps to PAs that agree with the cIPA below some power of two: blocks as large as that may come of it."""
        rng = self.rng
        first, last = self.pas
        units = [n for n in (self.page, 2 * M, 32 * M, G) if self.page <= n <= (last - first) // 4]
        agree = int(rng.choice([n for n in units if size <= 4096 * n]))
        pa = first + int(rng.integers(0, (last - first - size) // agree)) * agree + start % agree
        self.vm.host.map(start, pa, size, str(rng.choice(PERMS)), int(rng.choice(MEMATTRS)))


class GuestTables:
    """One random table of L1 in ``words``, memory that starts at ``base``, and the registers that select it."""

    def __init__(self, rng, words, base, features, aims, granule, big_endian):
        self.rng, self.words, self.base, self.features, self.aims = rng, words, base, features, aims
        self.granule, self.big_endian = granule, big_endian
        self.page_bits = granule.bit_length() - 1
        choices = start_levels(granule, features.pa_bits)
        starts = sorted({level for level, _ in choices})
        self.start = int(rng.choice(starts))
        self.ia_bits = int(rng.choice([ia for level, ia in choices if level == self.start]))
        ps = int(rng.integers(0, 8)) if rng.random() < 0.15 else 5
        self.oa_bits = min(PS_BITS[ps] if ps < 6 else 48, features.pa_bits)
        self.vtcr = (64 - self.ia_bits) | SL0[granule][self.start] << 6 | TG0[granule] << 14 | ps << 16 | 1 << 31
        self.vtcr |= int(rng.integers(0, 64)) << 8  # shareability and cacheability of the walk
        self.vtcr |= int(rng.integers(0, 1 << 10)) << 19  # VS, HA, HD, HWU
        self.next, self.slots, self.last_tables = base, [], []
        count = 1 << (self.ia_bits - self.shift(self.start))
        root = self.take(max(8 * count, 64))
        junk = int(rng.integers(0, 8 * count)) & ~1 | int(rng.integers(0, 2))  # below the table's alignment; CnP
        self.root = root | junk
        self.fill(root, self.start, 0, count)
        self.slots = np.concatenate(self.slots)

    def vttbr(self, vmid):
        return vmid << 48 | self.root

    def shift(self, level):
        return self.page_bits + (self.page_bits - 3) * (3 - level)

    def take(self, size):
        """Room for a table, aligned to its own size."""
        address = -(-self.next // size) * size
        self.next = address + size
        assert self.next <= self.base + 8 * len(self.words)
        return address

    def write(self, address, descs):
        start = (address - self.base) // 8
        self.words[start : start + len(descs)] = descs.byteswap() if self.big_endian else descs

    def fill(self, table, level, ipa, count):
        """A table full of leaves and junk, with a few tables below it."""
        rng = self.rng
        slots = np.zeros(count, SLOT_DTYPE)
        slots["ipa"] = ipa + (np.arange(count, dtype=np.uint64) << self.shift(level))
        slots["level"], slots["address"] = level, table + 8 * np.arange(count, dtype=np.uint64)
        if level in (*BLOCKS[self.granule], 3):
            self.leaves(slots, level)
            invalid = (rng.random(count) < 0.1) & ~slots["contiguous"]
        else:
            invalid = np.ones(count, bool)
        slots["desc"][invalid] = self.junk(level, np.count_nonzero(invalid))
        children = self.children(slots, level)
        for n in children:
            below = self.take(self.granule)
            if level == 2:
                self.last_tables.append((int(slots["address"][n]), int(slots["ipa"][n])))
            slots["desc"][n] = below | 3 | int(rng.integers(0, 1 << 63)) & TABLE_IGNORED
            self.fill(below, level + 1, int(slots["ipa"][n]), self.granule // 8)
        self.write(table, slots["desc"])
        self.slots.append(np.delete(slots, children))

    def children(self, slots, level):
        """Which slots become tables."""
        if level == 3:
            return []
        free = np.flatnonzero(~slots["contiguous"])
        return self.rng.choice(free, min(len(free), int(self.rng.integers(2, 6))), replace=False).tolist()

    def junk(self, level, count):
        """Invalid descriptors, among them the reserved type of level 3."""
        words = self.rng.integers(0, 1 << 64, count, dtype=np.uint64) & ~np.uint64(1)
        if level == 3:
            reserved = self.rng.random(count) < 0.3
            words[reserved] = words[reserved] & ~np.uint64(2) | np.uint64(1)
        words[self.rng.random(count) < 0.4] = 0
        return words

    def leaves(self, slots, level):
        """Leaves everywhere, some in contiguous groups."""
        count, shift = len(slots), self.shift(level)
        targets = self.targets(count) >> shift << shift
        group = CONTIGUOUS[self.granule][level]
        bits = shift + group.bit_length() - 1
        if count >= group and bits <= self.ia_bits:
            grouped = np.repeat(self.rng.random(count // group) < 0.1, group)
            first, n = np.arange(count) // group * group, np.arange(count, dtype=np.uint64) % group
            targets = np.where(grouped, (targets[first] >> bits << bits) + (n << shift), targets)
            attributes = self.attributes(np.where(grouped, targets | np.uint64((1 << bits) - 1), targets))
            attributes = np.where(grouped, attributes[first] | np.uint64(1 << 52), attributes)
            slots["contiguous"] = grouped
        else:
            attributes = self.attributes(targets)
        slots["oa"] = targets
        slots["desc"] = targets | attributes | np.uint64(3 if level == 3 else 1)

    def targets(self, count):
        """Where leaves lead: mostly what the host maps, sometimes anywhere, once in a while beyond what there is."""
        rng = self.rng
        found = self.aims.pick(rng, count)
        astray = rng.random(count) < 0.06
        bits = rng.integers(13, 49, count, dtype=np.uint64)
        found[astray] = (rng.integers(0, 1 << 48, count, dtype=np.uint64) & ((np.uint64(1) << bits) - 1))[astray]
        return found

    def attributes(self, reach):
        """MemAttr, S2AP, SH, AF, XN, and what hardware ignores, for leaves or contiguous groups that reach so far."""
        rng, count = self.rng, len(reach)
        words = rng.integers(0, 1 << 64, count, dtype=np.uint64) & np.uint64(IGNORED)
        words |= rng.choice(MEMATTRS, count) << 2
        words |= rng.choice(np.array([0, 1, 2, 3], np.uint64), count, p=[0.06, 0.2, 0.1, 0.64]) << 6  # S2AP
        words |= rng.integers(0, 4, count, dtype=np.uint64) << 8  # SH
        words |= (rng.random(count) < 0.93).astype(np.uint64) << 10  # AF
        words |= rng.choice(np.array([0, 0, 1, 2, 3], np.uint64), count) << 53  # XN
        # The output size comes before AF and permission: there the oracle must get as far as the PA.
        words[reach >> self.oa_bits != 0] |= np.uint64(0x4C0)
        return words

    def sample(self, count):
        """Addresses of leaves and junk at every level, aimed at what the host maps; a few are beyond the table."""
        rng, slots = self.rng, self.slots
        order = np.argsort(slots["level"], kind="stable")
        levels, firsts = np.unique(slots["level"][order], return_index=True)
        bounds = np.append(firsts, len(slots))
        weights = np.where(np.isin(levels, (*BLOCKS[self.granule], 3)), 1, 0.1)  # levels above have no leaves
        n = rng.choice(len(levels), count, p=weights / weights.sum())
        picked = slots[order[rng.integers(bounds[n], bounds[n + 1])]]
        span = np.uint64(1) << np.array([self.shift(level) for level in range(4)], np.uint64)[picked["level"]]
        offsets = self.aims.inside(rng, picked["oa"], span) - picked["oa"]
        anywhere = rng.random(count) < 0.3
        offsets[anywhere] = rng.integers(0, span, dtype=np.uint64)[anywhere]
        ipas = picked["ipa"] + offsets
        beyond = rng.random(count) < 0.02
        bits = rng.integers(self.ia_bits, self.features.pa_bits + 1, count, dtype=np.uint64)
        ipas[beyond] |= np.uint64(1) << bits[beyond]
        return ipas & np.uint64((1 << self.features.pa_bits) - 1)

    # Edits, with the TLBI that L1 owes for each: [(operation, operand)]

    def edit(self, count, whole_ranges=False):
        """Rewrites single leaves as other leaves or junk. A range names a part of the leaf, or all of it."""
        leaves = np.flatnonzero(~self.slots["contiguous"] & (self.slots["desc"] & 1 == 1))
        chosen = self.rng.choice(leaves, min(count, len(leaves)), replace=False)
        for n in chosen:
            self.rewrite(self.slots[n : n + 1])
        return [self.tlbi_of(slot, whole_ranges) for slot in self.slots[chosen]]

    def rewrite(self, slot):
        """Another leaf in this slot, the same one with other attributes, or none."""
        level, dice = int(slot["level"][0]), self.rng.random()
        if dice < 0.25:
            slot["desc"] = self.junk(level, 1)
        elif dice < 0.6:
            slot["desc"] = slot["oa"] | self.attributes(slot["oa"]) | np.uint64(3 if level == 3 else 1)
        else:
            self.leaves(slot, level)
        self.write(int(slot["address"][0]), slot["desc"])

    def tlbi_of(self, slot, whole_ranges):
        """Any form that names the slot: by some address of it, without or with its level, or as a range."""
        level, form = int(slot["level"]), self.rng.integers(0, 3)
        ipa = int(slot["ipa"]) + int(self.rng.integers(0, 1 << self.shift(level)))
        if form == 2:
            size = 1 << self.shift(level) if whole_ranges else self.granule
            return "RIPAS2E1IS", self.range_operand(ipa & -size, size)
        operand = rig.single(ipa, self.granule, level) if form else rig.single(ipa)
        return str(self.rng.choice(["IPAS2E1IS", "IPAS2LE1IS", "IPAS2E1"])), operand

    def cut(self):
        """Unhooks a last-level table, of which nothing is left, by a range; or nothing if there is none."""
        if not self.last_tables:
            return []
        address, ipa = self.last_tables.pop(int(self.rng.integers(0, len(self.last_tables))))
        size = 1 << self.shift(2)
        self.write(address, np.zeros(1, np.uint64))
        self.slots = self.slots[(self.slots["ipa"] < ipa) | (self.slots["ipa"] >= ipa + size)]
        return [("RIPAS2E1IS", self.range_operand(ipa, size))]

    def range_operand(self, ipa, size):
        """A range of this size, a power of two, or of two pages at least."""
        pages = max(size // self.granule, 2)
        scale = max(n for n in range(4) if pages >> (5 * n + 1))
        return rig.span(ipa, self.granule, scale, (pages >> (5 * scale + 1)) - 1)
