"""An engine beside the oracle of oracle.py, with the same memory: what the shadow says, and what the two stages say."""

from types import SimpleNamespace

import numpy as np
import pytest

import s2shadow
from oracle import PA_BITS, Oracle, Registers
from randomtables import SL0, TG0, GuestTables, HostMap, Region, start_levels
from s2shadow import HCR_CD, HCR_VM, HIT, HOST_FAULT, L1_FAULT, MAPPED, MMIO, READ, WRITE

K, M, G = 1 << 10, 1 << 20, 1 << 30
PAGE = 4 * K
SAMPLE = 6000  # addresses of each random guest
TABLES, TABLES_SIZE = 1 * G, 16 * M  # L1's tables
DATA = 4 * G
SHADOWS, SHADOWS_SIZE = 128 * G, 512 * M  # the engine's tables
PAS = 1 << 36  # host pages are from here on
ADDRESS_SIZE = 0xFF  # in place of a fault status code: an address size fault, of a level that the oracle does not tell


def regions_of(pa_bits):
    """L1's memory besides its tables: pages, blocks of 2 MiB and 1 GiB, a device, the very end of the address space."""
    top = 1 << pa_bits
    return (
        Region(DATA, 32 * M, PAGE),
        Region(8 * G, 512 * M, 2 * M),
        Region(32 * G, 2 * M, PAGE, device=True),
        Region(64 * G, 16 * G, G),
        Region(top // 2, 64 * M, 64 * K),
        Region(top - 2 * G, 2 * G, 32 * M),
    )


class Machine:
    """An engine, and the oracle with the same memory."""

    def __init__(self, cpu, host_granule=PAGE, pa_bits=None, regions=None, vcpus=1, **options):
        self.oracle = Oracle(cpu)
        self.features = features_of(cpu, host_granule, pa_bits)
        self.mem = s2shadow.GuestMemory()
        self.words = self.oracle.ram(TABLES, TABLES_SIZE)
        self.mem.add(TABLES, buffer=self.words)
        self.regions = regions or regions_of(self.features.pa_bits)
        for region in self.regions:
            self.mem.add(region.start, region.size, device=region.device)
        self.vm = s2shadow.NestedVM(self.mem, vcpus=vcpus, features=self.features, table_base=SHADOWS, **options)
        self.engines = self.oracle.ram(SHADOWS, SHADOWS_SIZE)
        self.placed = []

    def guest(self, tables, n=0, vmid=1, hcr=HCR_VM):
        """A vCPU that runs on these tables."""
        registers = {"vttbr": tables.vttbr(vmid), "vtcr": tables.vtcr, "hcr": hcr, "big_endian": tables.big_endian}
        vcpu = self.vm.vcpus[n]
        index = vcpu.load(**registers).index
        return SimpleNamespace(tables=tables, vcpu=vcpu, index=index, registers=registers, regs=Registers(**registers))

    def context(self, index):
        return next(context for context in self.vm.contexts if context.index == index)

    @property
    def canonical_vtcr(self):
        """The canonical table is as wide as PAs are, and starts at the last level that this allows."""
        granule, bits = self.features.host_granule, self.features.pa_bits
        start = max(level for level, ia in start_levels(granule, bits) if ia == bits)
        return 64 - bits | SL0[granule][start] << 6 | TG0[granule] << 14

    # What the oracle finds

    def engine_registers(self, index):
        """Puts a table of the engine, a shadow or None for the canonical one, where the oracle sees it."""
        for start, end in self.placed:
            self.engines[start:end] = 0  # a pointer to a page that is no longer in use shall lead nowhere
        addresses, pages = self.vm.tables(index)
        starts = ((addresses - SHADOWS) // 8).astype(int).tolist()
        self.placed = [(start, start + pages.shape[1] // 8) for start in starts]
        words = pages.view(np.uint64)
        if index is None:  # AF=0 in a host leaf is the host's to mend, no fault of L2's; in a table the bit is ignored
            words |= (words & np.uint64(1)) << np.uint64(10)
        for (start, end), page in zip(self.placed, words, strict=True):
            self.engines[start:end] = page
        if index is None:
            return Registers(int(addresses[0]), self.canonical_vtcr)
        context = self.context(index)
        return Registers(context.host_vttbr, context.host_vtcr, context.host_hcr)

    def walk_engine(self, index, ipas, el0=False):
        return self.oracle.walk(ipas, self.engine_registers(index), el0)

    def walk_guest(self, guest, ipas, el0=False):
        """L1's table, with the rule that the oracle lacks: a PA of 2^PS or more is an address size fault."""
        answers = self.oracle.walk(ipas, guest.regs, el0)
        too_large = answers["pa"] >> guest.tables.oa_bits != 0
        for name in ("read", "write"):
            answers[name][too_large], answers[name + "_fsc"][too_large] = False, ADDRESS_SIZE
        return answers

    def two_stages(self, guest, ipas, el0=False):
        """L1's table, then the host's; and what both together are."""
        first = self.walk_guest(guest, ipas, el0)
        reached = first["read"] | first["write"]
        second = self.walk_engine(None, np.where(reached, cipas_of(first, ipas), 0), el0)
        both = second.copy()
        for name in ("read", "write"):
            both[name] &= first[name]
        both["attr"] = stricter_type(first["attr"], second["attr"])
        both["sh"] = stricter_sh(first["sh"], second["sh"], both["attr"])
        return SimpleNamespace(first=first, second=second, both=both)


def features_of(cpu, host_granule=PAGE, pa_bits=None):
    """What the oracle implements, or with fewer address bits."""
    return s2shadow.Features(
        pa_bits=pa_bits or PA_BITS[cpu], fwb=False, xnx=False, hafdbs=0, host_granule=host_granule
    )


def cipas_of(first, ipas):
    return first["pa"] + (ipas & np.uint64(0xFFF))


class RandomMachine(Machine):
    """With a random host and guests that have random tables."""

    def __init__(self, rng, cpu, host_granule=PAGE, regions=None, pas_end=None, guests=2, tlbi="exact", **options):
        pa_bits = int(rng.choice([bits for bits in (40, 42, 44) if bits <= PA_BITS[cpu]]))
        super().__init__(cpu, host_granule, pa_bits, regions, guests, tlbi=tlbi, **options)
        self.rng, self.tlbi, self.el0 = rng, tlbi, bool(rng.random() < 0.3)
        self.host = HostMap(rng, self.vm, self.regions, (PAS, pas_end or 1 << pa_bits))
        if not pas_end and rng.random() < 0.3:  # the holes are filled when they are touched
            self.vm.host.populate = s2shadow.Linear(max_block=int(rng.choice([self.host.page, 64 * M, G])))
        room = TABLES_SIZE // guests
        self.guests = [self.random_guest(n, TABLES + n * room, room) for n in range(guests)]

    def random_guest(self, n, base, room):
        rng, words = self.rng, self.words[(base - TABLES) // 8 : (base - TABLES + room) // 8]
        granule, big_endian = int(rng.choice(self.features.granules)), bool(rng.random() < 0.3)
        tables = GuestTables(rng, words, base, self.features, self.host.extents, granule, big_endian)
        vmid = 1 + n + 256 * int(rng.integers(0, 256))  # the upper byte counts only where VTCR_EL2.VS is set
        guest = self.guest(tables, n, vmid, HCR_VM | int(rng.choice([0, 0, HCR_CD])))
        guest.ipas = tables.sample(SAMPLE)
        return guest

    def fill(self):
        """Faults every address of every guest in; [(answers to reads, to writes)]. Twice, since the first write to a
        page that is logged splits the host's block and drops the shadows over it."""
        for _ in range(2):
            answers = [[g.vcpu.fault_many(g.ipas, access) for access in (READ, WRITE)] for g in self.guests]
        return answers

    def expected(self, guest):
        return self.two_stages(guest, guest.ipas, self.el0)

    def shadow(self, guest):
        return self.walk_engine(guest.index, guest.ipas, self.el0)


# The combination of two stages, spec 02 section 6, on MAIR codes


def stricter_type(a, b):
    """Device beats Normal, the weaker Device wins; of Normal memory the less cacheable, inner and outer each."""
    device_a, device_b = a < 0x10, b < 0x10
    normal = np.minimum(a & 0xF0, b & 0xF0) | np.minimum(a & 0xF, b & 0xF)
    return np.where(device_a & device_b, np.minimum(a, b), np.where(device_a, a, np.where(device_b, b, normal)))


def stricter_sh(a, b, attr):
    """Outer, else inner, else non-shareable; Device and non-cacheable memory are outer shareable."""
    sh = np.where((a == 2) | (b == 2), 2, np.where((a == 3) | (b == 3), 3, 0))
    return np.where((attr < 0x10) | (attr == 0x44), 2, sh)


# Comparison


def differences(shadow, both):
    """Which addresses the shadow answers otherwise than the two stages do."""
    return (shadow["read"] != both["read"]) | (shadow["write"] != both["write"]) | elsewhere(shadow, both)


def excess(shadow, both):
    """Which addresses the shadow allows what the two stages do not, or takes elsewhere."""
    return shadow["read"] & ~both["read"] | shadow["write"] & ~both["write"] | elsewhere(shadow, both)


def elsewhere(shadow, both):
    """Which addresses the shadow takes to another page or another kind of memory."""
    allowed = shadow["read"] | shadow["write"]
    return allowed & ((shadow["pa"] != both["pa"]) | (shadow["attr"] != both["attr"]) | (shadow["sh"] != both["sh"]))


def assert_none(wrong, guest, **columns):
    """No address is wrong; else the guest, and each column at the first few of them."""
    __tracebackhide__ = True
    if wrong.any():
        tables = guest.tables
        lines = [
            f"{np.count_nonzero(wrong)} of {len(wrong)} addresses; {tables.granule // K}K, start level {tables.start}, "
            f"IA {tables.ia_bits}, " + ", ".join(f"{name} {value:#x}" for name, value in guest.registers.items())
        ]
        for n in np.flatnonzero(wrong)[:4]:
            lines.append("; ".join(f"{name} {column[n]}" for name, column in columns.items()))
        pytest.fail("\n".join(lines))


def compare_shadow(machine, guest, seen, wrong=differences):
    """The shadow against the two stages, and the engine's own reading of it, at every address."""
    stages, shadow = machine.expected(guest), machine.shadow(guest)
    assert_none(wrong(shadow, stages.both), guest, ipa=guest.ipas, shadow=shadow, **vars(stages))
    for name, access in (("read", READ), ("write", WRITE)):
        ours = guest.vcpu.translate_many(guest.ipas, access)
        bad = (ours["kind"] == HIT) != shadow[name]
        bad |= shadow[name] & (ours["pa"] >> 12 << 12 != shadow["pa"])
        assert_none(bad, guest, ipa=guest.ipas, engine=ours, shadow=shadow)
        seen[name] += np.count_nonzero(shadow[name])
    seen["addresses"] += len(shadow)
    seen["fault"] += np.count_nonzero(~shadow["read"] & ~shadow["write"])
    return stages


def compare_answers(machine, guest, name, answers, stages):
    """What the engine said to each read (or write), against what the oracle says of each stage."""
    first, second = stages.first, stages.second
    cipas, kind = cipas_of(first, guest.ipas), answers["kind"]
    outside = np.ones(len(cipas), bool)
    for region in machine.mem.regions:
        outside &= (cipas < region.start) | (cipas >= region.start + region.size)
    fsc = first[name + "_fsc"]
    same_fsc = np.where(fsc == ADDRESS_SIZE, answers["fsc"] < 4, answers["fsc"] == fsc)
    reached = first[name]
    wrong = ~reached & ((kind != L1_FAULT) | ~same_fsc)
    wrong |= reached & second[name] & (~np.isin(kind, [HIT, MAPPED]) | (answers["pa"] >> 12 << 12 != second["pa"]))
    wrong |= reached & ~second[name] & np.where(outside, kind != MMIO, ~np.isin(kind, [HOST_FAULT, MMIO]))
    assert_none(wrong, guest, ipa=guest.ipas, answer=answers, **vars(stages))
