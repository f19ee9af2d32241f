"""Formats of L1's and of the host's tables by hand: granules that are not offered, contiguous groups, 52-bit hosts."""

import itertools

import pytest

import rig
import s2shadow
from model.walk import START_LEVEL
from rig import AF, CONTIGUOUS, DATA, DIRTY, DS, HA, HD, HOST, RAM, G, K, M, Rig, Tables
from s2shadow import HCR_VM, L1_FAULT, MAPPED, READ, WRITE, Features

TG0_BITS = 3 << 14
GRANULES = (4 * K, 16 * K, 64 * K)


# A granule that is not offered


def offered(host_granule):
    return [granule for granule in GRANULES if granule >= host_granule]


@pytest.mark.parametrize("tg0", range(4))
@pytest.mark.parametrize("granules", [(16 * K, 64 * K), (64 * K,), (4 * K, 64 * K), (4 * K, 16 * K), (4 * K,)], ids=str)
def test_granule_not_offered(granules, tg0):
    """L1 programs TG0 all the same: the smallest granule that is offered is used, by walks, faults and TLBIs alike."""
    feat = Features(granules=granules, host_granule=min(granules))
    asked = {0: 4 * K, 1: 64 * K, 2: 16 * K}.get(tg0)
    used = asked if asked in granules else min(granules)
    r = Rig(features=feat, granule=used)
    r.tables.vtcr = r.tables.vtcr & ~TG0_BITS | tg0 << 14
    r.tables.map(3 * used, DATA + used)
    r.tables.map(r.tables.size(2), RAM & -r.tables.size(2), level=2)
    context = r.load()
    cfg = s2shadow.Stage2Config(r.tables.vttbr(), r.tables.vtcr, features=feat)
    assert (cfg.granule, cfg.error) == (used, None)
    f = r.fault(3 * used + 0x123)
    assert (f.kind, f.cipa, f.level, f.size) == (MAPPED, DATA + used + 0x123, 3, min(used, feat.host_granule))
    assert s2shadow.walk(r.mem, cfg, 3 * used + 0x123).pa == f.cipa
    block = RAM & -r.tables.size(2)
    assert r.fault(r.tables.size(2) + RAM - block + 5 * used).cipa == RAM + 5 * used
    last = used - feat.host_granule  # L1 names the page by any address in it
    assert r.vm.vcpus[0].tlbi("IPAS2E1IS", (3 * used + last) >> 12).removed == 1
    assert [row["guest_level"].item() for row in r.shadow(context.index)] == [2]
    r.vm.check()


@pytest.mark.parametrize("granules", [(16 * K, 64 * K), (64 * K,)], ids=str)
def test_start_level_of_the_granule_in_use(granules):
    """SL0 and T0SZ are read as those of the granule in use, not of the one that was asked for."""
    feat = Features(granules=granules, host_granule=min(granules))
    for sl0, ia in itertools.product(range(4), range(25, 49)):
        vtcr = (64 - ia) | sl0 << 6 | 5 << 16  # TG0 = 4K
        cfg = s2shadow.Stage2Config(RAM, vtcr, features=feat)
        assert cfg.granule == min(granules)
        start = START_LEVEL.get((min(granules), 0, sl0))
        if cfg.error is None:
            assert cfg.start_level == start
        if start is None:
            assert cfg.error == "translation fault, level 0"


def test_illegal_once_reinterpreted():
    """4K's SL0 = 2 with a 40-bit input starts at level 0; as 64K's it is level 1, which 40 bits do not reach."""
    feat = Features(host_granule=64 * K)
    r = Rig(features=feat, granule=64 * K)
    r.vcpu.load(RAM, 24 | 2 << 6 | 5 << 16, hcr=HCR_VM)
    f = r.fault(0)
    assert (f.kind, f.fsc, f.level) == (L1_FAULT, 0x04, 0)


# Contiguous groups

ENTRIES = {  # (granule, level): adjacent entries that the bit joins
    (4 * K, 3): 16, (4 * K, 2): 16, (4 * K, 1): 16,
    (16 * K, 3): 128, (16 * K, 2): 32,
    (64 * K, 3): 32, (64 * K, 2): 32,
}  # fmt: skip
IGNORED = [(4 * K, 0), (16 * K, 1), (64 * K, 1)]
WIDE = Features(pa_bits=52, lpa=True, lpa2=True, hafdbs=2, ttst=True)
FORMATS = [False, True]


class Group:
    """One contiguous group of L1's, and the memory and registers to walk it."""

    def __init__(self, granule, level, wide=False, entries=None, vtcr=0, big_endian=False):
        self.mem = s2shadow.GuestMemory()
        self.mem.add(RAM, 64 * M)
        self.tables = Tables(
            self.mem.read64, self.mem.write64, RAM, granule, vtcr, big_endian, start=level - 1 if level > 1 else level,
            wide=wide,
        )  # fmt: skip
        self.level, self.size = level, self.tables.size(level)
        self.entries = entries or ENTRIES[granule, level]
        self.span = self.entries * self.size
        self.ipa = self.span  # the second group, so that its index is not 0
        self.cipa = 3 * self.span
        self.where = [
            self.tables.map(self.ipa + n * self.size, self.cipa + n * self.size, level, extra=CONTIGUOUS)
            for n in range(self.entries)
        ]
        self.cfg = s2shadow.Stage2Config(self.tables.vttbr(), self.tables.vtcr, WIDE, big_endian=big_endian)
        assert self.cfg.error is None

    def walk(self, n, access=READ, **options):
        w = s2shadow.walk(self.mem, self.cfg, self.ipa + n * self.size + 0x238, access, trace=True, **options)
        assert s2shadow.walk(self.mem, self.cfg, w.ipa, access, update=False).pa == w.pa
        return w

    def change(self, n, clear=0, set=0):
        self.tables.set(self.where[n], self.tables.get(self.where[n]) & ~clear | set)


@pytest.fixture(params=ENTRIES, ids=lambda key: f"{key[0] // K}K-L{key[1]}")
def shape(request):
    return request.param


@pytest.mark.parametrize("wide", FORMATS, ids=["48", "52"])
def test_group(shape, wide):
    """Well programmed: every member translates as it says, and nothing is noted."""
    group = Group(*shape, wide)
    for n in (0, 1, group.entries // 2, group.entries - 1):
        w = group.walk(n)
        assert (w.status, w.pa, w.size, w.contiguous) == (0, group.cipa + n * group.size + 0x238, group.size, 1)
        assert w.notes == () and len(w.steps) == (2 if group.level > 1 else 1)


@pytest.mark.parametrize("wide", FORMATS, ids=["48", "52"])
def test_output_comes_from_the_address(shape, wide):
    """The output's bits below the group's size are those of the IPA, whatever this entry holds there; it is noted."""
    group = Group(*shape, wide)
    other = 5 % group.entries
    group.tables.map(group.ipa + group.size, group.cipa + other * group.size, group.level, extra=CONTIGUOUS)
    w = group.walk(1)
    assert (w.status, w.pa) == (0, group.cipa + group.size + 0x238)
    assert w.notes and all("misprogrammed" in note for note in w.notes)
    assert len(group.walk(0).notes) == 1


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("harm", ["invalid", "not-contiguous", "read-only", "memattr", "elsewhere", "not-aligned"])
def test_misprogrammed(shape, harm, big_endian):
    """A member that does not fit is named when any other one is walked; the translation goes on by the group's rule."""
    group = Group(*shape, big_endian=big_endian)
    last = group.entries - 1
    if harm == "not-aligned":
        for n in range(group.entries):
            group.tables.map(group.ipa + n * group.size, group.cipa + (n + 1) * group.size, group.level,
                             extra=CONTIGUOUS)  # fmt: skip
    else:
        bits = {
            "invalid": {"clear": 1},
            "not-contiguous": {"clear": CONTIGUOUS},
            "read-only": {"clear": DIRTY},  # with DBM that would be a clean page: see below
            "memattr": {"clear": 1 << 2},
            "elsewhere": {"set": 1 << 46},
        }
        group.change(last, **bits[harm])
    w = group.walk(0)
    (note,) = w.notes
    assert "misprogrammed" in note and w.steps[-1].notes == (note,)
    offset = group.size if harm == "not-aligned" else 0
    assert (w.status, w.pa & -group.span) == (0, group.cipa + offset & -group.span)
    index = (group.where[last] - w.steps[-1].table) // 8
    assert harm == "not-aligned" or str(index) in note


def test_hardware_updates_one_by_one(shape):
    """AF and dirty state of the members go their own ways, and software has bits 58:55 to itself: nothing to note."""
    group = Group(*shape, vtcr=HA | HD)
    for n in range(group.entries):
        group.change(n, clear=AF | DIRTY, set=rig.DBM | n % 16 << 55)
    assert group.walk(2, WRITE).updated == group.walk(3).updated == 1
    assert group.tables.get(group.where[2]) & (AF | DIRTY) == AF | DIRTY
    assert group.tables.get(group.where[3]) & (AF | DIRTY) == AF
    assert not group.tables.get(group.where[4]) & (AF | DIRTY)
    assert group.walk(0, update=False).notes == ()


@pytest.mark.parametrize(("granule", "level"), IGNORED)
def test_ignored(granule, level):
    """At these levels the bit joins nothing: the output is the descriptor's own."""
    group = Group(granule, level, wide=True, entries=2)
    group.tables.map(group.ipa + group.size, 7 * group.size, level, extra=CONTIGUOUS)
    w = group.walk(1)
    assert (w.status, w.pa, w.contiguous) == (0, 7 * group.size + 0x238, 1)
    assert len(w.notes) == 1 and "ignored" in w.notes[0]


@pytest.mark.parametrize(("granule", "ia"), [(16 * K, 16), (16 * K, 20), (64 * K, 17), (64 * K, 20)])
def test_group_larger_than_the_input(granule, ia):
    """A last-level start table that is smaller than the group: the bit is ignored (IMPLEMENTATION DEFINED)."""
    mem = s2shadow.GuestMemory()
    mem.add(RAM, M)
    sl0, tg0 = rig.SL0[granule][3], rig.TG0[granule]
    vtcr = (64 - ia) | sl0 << 6 | tg0 << 14 | 5 << 16
    cfg = s2shadow.Stage2Config(RAM, vtcr, WIDE)
    assert cfg.error is None
    mem.write64(RAM + 8, 0x8000_0000 + 5 * granule | 3 | 15 << 2 | 3 << 6 | AF | CONTIGUOUS)
    w = s2shadow.walk(mem, cfg, granule, trace=True)
    assert w.pa == 0x8000_0000 + 5 * granule
    assert len(w.notes) == 1 and "ignored" in w.notes[0]


@pytest.mark.parametrize("wide", FORMATS, ids=["48", "52"])
def test_group_in_the_engine(shape, wide):
    """Each member is a leaf of its own; a misprogrammed one goes where the group's rule says, not where it points."""
    granule, level = shape
    r = Rig(features=WIDE, granule=granule, wide=wide, host=False)
    r.vm.host.populate = s2shadow.Linear(offset=HOST)
    r.tables = r.new_tables(granule, start=1, wide=wide)
    size, entries = r.tables.size(level), ENTRIES[shape]
    span = size * entries
    region = 8 * span if span > RAM else 0x1_0000_0000
    r.mem.add(region, 8 * size)
    assert region % span == 0
    for n in range(entries):
        r.tables.map(span + n * size, region + n * size, level, extra=CONTIGUOUS)
    r.tables.map(span + 3 * size, region + 9 * size, level, extra=CONTIGUOUS)
    context = r.load()
    for n in (0, 3, 7):
        f = r.fault(span + n * size + 0x238)
        assert (f.kind, f.cipa, f.pa) == (MAPPED, region + n * size + 0x238, HOST + region + n * size + 0x238)
    assert r.vcpu.tlbi("IPAS2E1IS", (span + 3 * size) >> 12).removed == 1
    assert len(r.shadow(context.index)) == 2
    r.vm.check()


# The host's own tables with 52-bit addresses

HUGE = {4 * K: 512 * G, 16 * K: 64 * G, 64 * K: 4096 * G}
HIGH = 0xF << 48


class TestWideHost:
    @pytest.fixture(params=GRANULES, ids=lambda size: f"{size // K}K")
    def host_granule(self, request):
        return request.param

    def test_refused_without_the_feature(self, host_granule):
        """52 bits need FEAT_LPA2 with 4K and 16K pages, FEAT_LPA with 64K ones."""
        needed, other = ("lpa", "lpa2") if host_granule == 64 * K else ("lpa2", "lpa")
        mem = s2shadow.GuestMemory()
        for features in ({}, {other: True}):
            with pytest.raises(ValueError, match=needed):
                s2shadow.NestedVM(mem, features=Features(pa_bits=52, host_granule=host_granule, **features))
        s2shadow.NestedVM(mem, features=Features(pa_bits=52, host_granule=host_granule, **{needed: True}))

    def vm(self, host_granule, **options):
        """Stage 2 of L1 off, so that the host's leaves show; memory of the size of the largest block, at the top."""
        size = HUGE[host_granule]
        mem = s2shadow.GuestMemory()
        mem.add(HIGH, size)
        feat = Features(pa_bits=52, host_granule=host_granule, lpa=True, lpa2=True)
        vm = s2shadow.NestedVM(mem, features=feat, **options)
        vm.vcpus[0].load(0, 0, hcr=0)
        return vm, size

    def test_registers(self, host_granule):
        """VTCR_EL2 and VTTBR_EL2 of a context are in the 52-bit form: PS, DS, the base's top bits in 5:2."""
        vm, _ = self.vm(host_granule, table_base=0x9 << 48)
        (context,) = vm.contexts
        assert context.host_vtcr >> 16 & 7 == 6
        assert bool(context.host_vtcr & DS) == (host_granule != 64 * K)
        assert context.host_vtcr >> 12 & 3 == 3
        assert context.host_vttbr >> 2 & 15 == 9
        cfg = s2shadow.Stage2Config(context.host_vttbr, context.host_vtcr, vm.features)
        assert (cfg.error, cfg.oa_bits, cfg.ia_bits, cfg.granule) == (None, 52, 52, host_granule)
        assert cfg.baddr == vm.tables(0)[0][0]

    def test_largest_block(self, host_granule):
        """One leaf for all of it, with the address where the format has it."""
        vm, size = self.vm(host_granule)
        pa = 0x6 << 48 | size
        vm.host.map(HIGH, pa, size)
        f = vm.vcpus[0].fault(HIGH + size // 2 + 8, WRITE)
        assert (f.kind, f.size, f.pa) == (MAPPED, size, pa + size // 2 + 8)
        (row,) = vm.shadow(0)
        desc = row["desc"].item()
        place = (pa & (1 << 48) - 1 | pa >> 48 << 12) if host_granule == 64 * K else pa & (1 << 50) - 1 | pa >> 50 << 8
        sh = 3 << 8 if host_granule == 64 * K else 0
        assert desc & (1 << 53) - 1 == place | sh | 1 | 6 << 2 | 3 << 6 | AF
        assert (row["size"], row["sh"], row["level"]) == (size, 3, 0 if host_granule == 4 * K else 1)
        assert vm.host.leaves()[["cipa", "pa", "size"]].tolist() == [(HIGH, pa, size)]
        vm.check()

    def test_write_while_logged_splits_it(self, host_granule):
        """Down to a page, through every level; the rest of it stays where it was."""
        vm, size = self.vm(host_granule)
        pa = 0x6 << 48
        vm.host.map(HIGH, pa, size)
        assert vm.vcpus[0].fault(HIGH).size == size
        vm.log_dirty(HIGH, HIGH + size)
        f = vm.vcpus[0].fault(HIGH + 5 * host_granule, WRITE)
        assert (f.kind, f.size) == (MAPPED, host_granule)
        rows = vm.host.leaves()
        assert int(rows["size"].sum()) == size
        assert ((rows["cipa"] - rows["pa"]) == HIGH - pa).all()
        assert [row["cipa"].item() for row in rows if row["perm"] & WRITE] == [HIGH + 5 * host_granule]
        far = vm.vcpus[0].fault(HIGH + size - 8)
        assert (far.kind, far.pa) == (MAPPED, pa + size - 8)
        vm.check()

    def test_aliases_of_the_top_page(self, host_granule):
        """The reverse map reaches the last page of 52 bits."""
        top = (1 << 52) - host_granule
        vm, size = self.vm(host_granule)
        assert HIGH + size <= 1 << 52
        vm.mem.add(top, host_granule)
        vm.host.map(top, 0, host_granule)
        assert vm.vcpus[0].fault(top).kind == MAPPED
        assert vm.reverse(top)["ipa"].tolist() == [top]
        assert vm.unmap(top, 1 << 52).leaves == 1
        vm.check()
