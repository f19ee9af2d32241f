"""Changes of the host's table: map, unmap, protect, load, and what they take from the shadows."""

import gc

import numpy as np
import pytest

import rig
import s2shadow
import snapshots
from rig import DATA, HOST, PAGE, RAM, G, K, M, Rig
from s2shadow import EXEC, EXEC_EL0, HIT, HOST_FAULT, MAPPED, MMIO, READ, WRITE

RX, RWX = READ | EXEC | EXEC_EL0, READ | WRITE | EXEC | EXEC_EL0


@pytest.fixture
def r():
    """L1 maps the first 8 MiB of L2's memory to DATA: half in pages, half in blocks."""
    r = Rig()
    r.tables.map_range(0, DATA, 4 * M)
    r.tables.map_range(4 * M, DATA + 4 * M, 4 * M, level=2)
    return r


def touch(r, *ipas, access=READ):
    return [int(r.fault(ipa, access).kind) for ipa in ipas]


# map


@pytest.mark.parametrize(
    ("cipa", "pa", "size", "leaves"),
    [
        (0x4000_0000, 0x8000_0000, 4 * K, [4 * K]),
        (0x4000_0000, 0x8000_0000, 2 * M, [2 * M]),
        (0x4000_0000, 0x8000_0000, G, [G]),
        (0x4000_0000, 0x8020_0000, G, [2 * M] * 512),
        (0x4000_1000, 0x8000_1000, 2 * M, [4 * K] * 512),
        (0x4000_0000, 0x8000_1000, 2 * M, [4 * K] * 512),
        (0x401F_F000, 0x801F_F000, 2 * M + 8 * K, [4 * K, 2 * M, 4 * K]),
    ],
)
def test_map_largest_blocks(cipa, pa, size, leaves):
    """Blocks as large as both addresses and the size allow."""
    r = Rig(host=False)
    r.vm.host.map(cipa, pa, size)
    got = r.host_leaves()
    assert [leaf[2] for leaf in got] == leaves
    starts = [cipa + n for n in np.cumsum([0, *leaves[:-1]]).tolist()]
    assert [leaf[0] for leaf in got] == starts
    assert [leaf[1] - leaf[0] for leaf in got] == [pa - cipa] * len(leaves)
    r.vm.check()


@pytest.mark.parametrize("granule", [16 * K, 64 * K])
def test_host_granule(granule):
    """A host of 16K or 64K pages: its own leaf sizes, refusals at its own alignment, and shadows that walk."""
    r = Rig(features=s2shadow.Features(host_granule=granule), host=False, granule=granule)
    block = 32 * M if granule == 16 * K else 512 * M
    r.vm.host.map(DATA & -granule, HOST + (DATA & -granule), 4 * granule)
    assert [leaf[2] for leaf in r.host_leaves()] == [granule] * 4
    with pytest.raises(ValueError):
        r.vm.host.map(DATA + 4 * K, HOST, granule)
    r.mem.add(64 * G, block)
    r.vm.host.map(64 * G, 128 * G, block)
    assert r.host_leaves()[-1][:3] == (64 * G, 128 * G, block)
    r.tables.map(block, 64 * G, level=2)
    f = r.fault(block + 0x12345)
    assert (f.kind, f.size, f.pa) == (MAPPED, block, 128 * G + 0x12345)
    assert r.vm.unmap(64 * G, 64 * G + granule).leaves == 1
    assert r.host_leaves()[4][:3] == (64 * G + granule, 128 * G + granule, granule)
    assert r.fault(block + granule).size == granule
    r.vm.check()


def test_remap_drops(r):
    """A new PA over a live range: its shadows go, those beside it stay, and the new PA is what one gets."""
    touch(r, 0, PAGE, 2 * PAGE)
    change = r.vm.host.map(DATA + PAGE, 2 * HOST, PAGE)
    assert change is None or change.leaves == 1
    assert r.leaves() == [(0, DATA, PAGE), (2 * PAGE, DATA + 2 * PAGE, PAGE)]
    assert (r.fault(PAGE).pa, r.fault(0).pa) == (2 * HOST, HOST + DATA)
    r.vm.check()


def test_identical_remap_is_nothing(r):
    """Mapping what is mapped already drops nothing and owes nothing."""
    touch(r, 0, PAGE, 4 * M)
    r.vm.take_tlbis()
    r.vm.host.map(RAM, HOST + RAM, 64 * M)
    assert len(r.shadow()) == 3
    assert len(r.vm.take_tlbis()) == 0


def test_map_splits_around(r):
    """A page mapped into a host block leaves the rest of the block in place."""
    r.vm.host.map(DATA + PAGE, 2 * HOST, PAGE)
    leaves = {leaf[0]: leaf for leaf in r.host_leaves()}
    assert leaves[DATA + PAGE][1:3] == (2 * HOST, PAGE)
    assert leaves[DATA][1:3] == (HOST + DATA, PAGE)
    assert leaves[DATA + 2 * M][2] == 2 * M
    assert sum(leaf[2] for leaf in leaves.values()) == 64 * M


# unmap


def test_unmap_page(r):
    """One page: every shadow of it in one context, and the host's own leaf."""
    touch(r, 0, PAGE, 2 * PAGE)
    change = r.vm.unmap(DATA + PAGE, DATA + 2 * PAGE)
    assert change.leaves == 1
    assert r.leaves() == [(0, DATA, PAGE), (2 * PAGE, DATA + 2 * PAGE, PAGE)]
    assert touch(r, PAGE, 0) == [HOST_FAULT, HIT]
    r.vm.check()


def test_unmap_all_aliases(r):
    """Many nested addresses and several contexts for one page: all go, nothing else."""
    for n in range(50):
        r.tables.map(16 * M + n * PAGE, DATA)
    for vmid in (1, 2):
        r.load(vmid)
        touch(r, *(16 * M + n * PAGE for n in range(50)), PAGE)
    assert len(r.vm.reverse(DATA)) == 100
    assert r.vm.unmap(DATA, DATA + PAGE).leaves == 100
    assert len(r.vm.reverse(DATA)) == 0
    assert [len(r.shadow(n)) for n in (0, 1)] == [1, 1]
    r.vm.check()


def test_unmap_block_partly(r):
    """Default: the host block is split, its shadow block dropped whole, the rest refills on demand."""
    touch(r, 4 * M)
    assert r.leaves() == [(4 * M, DATA + 4 * M, 2 * M)]
    change = r.vm.unmap(DATA + 4 * M + PAGE, DATA + 4 * M + 2 * PAGE)
    assert change.leaves == 1
    assert len(r.shadow()) == 0
    assert touch(r, 4 * M, 4 * M + PAGE, 4 * M + 2 * PAGE) == [MAPPED, HOST_FAULT, MAPPED]
    assert {leaf[2] for leaf in r.leaves()} == {PAGE}
    r.vm.check()


def test_unmap_splits_a_gigabyte():
    """A page out of 1 GiB: 2 MiB blocks remain around the one block in pages; 2 MiB shadows elsewhere stay."""
    r = Rig(host=False)
    r.mem.add(4 * G, G)
    r.vm.host.map(4 * G, 16 * G, G)
    r.tables.map_range(0, 4 * G, 8 * M, level=2)
    touch(r, 0, 2 * M, 4 * M)
    assert r.vm.unmap(4 * G + 2 * M, 4 * G + 2 * M + PAGE).leaves == 1
    sizes = [leaf[2] for leaf in r.host_leaves()]
    assert (sizes.count(2 * M), sizes.count(PAGE)) == (511, 511)
    assert [leaf[0] for leaf in r.leaves()] == [0, 4 * M]
    assert touch(r, 0, 2 * M, 2 * M + PAGE) == [HIT, HOST_FAULT, MAPPED]
    r.vm.check()


def test_unmap_drop(r):
    """partial="drop": a host block partly covered goes whole, as Linux does."""
    touch(r, 0, 4 * M, 6 * M)
    change = r.vm.unmap(DATA + 4 * M + PAGE, DATA + 4 * M + 2 * PAGE, partial="drop")
    assert change.leaves == 1
    assert touch(r, 4 * M, 4 * M + PAGE) == [HOST_FAULT, HOST_FAULT]
    assert touch(r, 0, 6 * M) == [HIT, HIT]
    assert sum(leaf[2] for leaf in r.host_leaves()) == 62 * M
    r.vm.check()


def test_unmap_pages_of_split_block_keep_their_shadows(r):
    """Page shadows beside the page that goes survive the split of the host block below them."""
    touch(r, *range(0, 2 * M, PAGE))
    assert r.vm.unmap(DATA + 5 * PAGE, DATA + 7 * PAGE).leaves == 2
    assert len(r.shadow()) == 510


@pytest.mark.parametrize(("start", "end"), [(0, 1 << 48), (RAM, RAM + 64 * M), (0, RAM + 64 * M), (RAM, 1 << 47)])
def test_unmap_everything(r, start, end):
    """A range over everything, as wide as the machine."""
    touch(r, *range(0, 8 * M, 64 * K))
    live = len(r.shadow())
    assert r.vm.unmap(start, end).leaves == live
    assert len(r.shadow()) == 0 and r.host_leaves() == []
    assert r.vm.stats.live == 0 and r.vm.stats.host_leaves == 0
    r.vm.check()


def test_unmap_nothing(r):
    """Where nothing is mapped nothing happens, and an empty range is no error."""
    touch(r, 0)
    assert r.vm.unmap(RAM + 64 * M, RAM + 128 * M).leaves == 0
    assert r.vm.unmap(DATA, DATA).leaves == 0
    assert len(r.shadow()) == 1


def test_widest_ranges(r):
    """Every range operation takes the whole address space in its stride."""
    touch(r, 0, 4 * M, access=WRITE)
    whole = (0, 1 << 48)
    r.vm.log_dirty(*whole)
    assert not (r.shadow()["perm"] & WRITE).any()
    r.vm.log_dirty(*whole, on=False)
    r.vm.host.protect(*whole, "rx")
    assert touch(r, 0, access=WRITE) == [HOST_FAULT]
    r.vm.host.map(1 << 40, 1 << 41, 1 << 40)
    assert r.host_leaves()[-1][2] == G
    assert r.vm.unmap(*whole).leaves == 2
    assert r.host_leaves() == []
    r.vm.check()


def test_many_contexts():
    """One page in 64 contexts: one unmap takes 64 leaves."""
    r = Rig(vcpus=64)
    r.tables.map(0, DATA)
    for n in range(64):
        r.load(n + 1, n=n)
        assert r.fault(0, n=n).kind == MAPPED
    assert r.vm.unmap(DATA, DATA + PAGE).leaves == 64
    r.vm.check()


def test_memory_added_later(r):
    """A region that appears while the engine runs is found by the next fault."""
    r.tables.map(16 * M, rig.NOWHERE)
    assert touch(r, 16 * M) == [MMIO]
    r.mem.add(rig.NOWHERE, 2 * M)
    assert touch(r, 16 * M) == [HOST_FAULT]
    r.vm.host.map(rig.NOWHERE, HOST + rig.NOWHERE, 2 * M)
    assert touch(r, 16 * M) == [MAPPED]


def test_parts_keep_the_engine():
    """A vCPU or the host's table in hand keeps the engine alive behind it."""
    mem = s2shadow.GuestMemory()
    vcpu, host = s2shadow.NestedVM(mem).vcpus[0], s2shadow.NestedVM(mem).host
    gc.collect()
    vcpu.load(0, 0, hcr=0)
    assert vcpu.fault(0).kind == MMIO
    host.map(0, 0, PAGE)
    assert len(host.leaves()) == 1


# protect


def test_protect_narrows(r):
    """Write permission taken: shadows stay without W, reads still hit, writes are the host's."""
    touch(r, 0, 4 * M, access=WRITE)
    r.vm.host.protect(DATA, DATA + 8 * M, "rx")
    assert r.shadow()["perm"].tolist() == [RX, RX]
    assert touch(r, 0, 4 * M) == [HIT, HIT]
    assert touch(r, 0, 4 * M, access=WRITE) == [HOST_FAULT, HOST_FAULT]
    r.vm.check()


def test_protect_partly(r):
    """A page of a block: the host block is split, the shadow block over it dropped, pages beside it untouched."""
    touch(r, 0, PAGE, 4 * M, access=WRITE)
    change = r.vm.host.protect(DATA + 4 * M, DATA + 4 * M + PAGE, "r")
    assert change.leaves == 1
    assert r.leaves() == [(0, DATA, PAGE), (PAGE, DATA + PAGE, PAGE)]
    assert touch(r, 4 * M, access=WRITE) == [HOST_FAULT]
    assert touch(r, 4 * M + PAGE, access=WRITE) == [MAPPED]
    r.vm.host.protect(DATA, DATA + PAGE, "r")
    assert [row["perm"] for row in r.shadow()][:2] == [READ, RWX]
    r.vm.check()


def test_a_drop_ends_where_the_range_does(r):
    """What only follows a range that blocks or pages fill is not dropped with it."""
    assert touch(r, 4 * M, 6 * M) == [MAPPED] * 2
    r.vm.unmap(DATA + 4 * M, DATA + 6 * M, partial="drop")
    r.vm.host.map(DATA, HOST + PAGE, 4 * PAGE)  # in pages
    r.vm.unmap(DATA + PAGE, DATA + 2 * PAGE, partial="drop")
    assert touch(r, 4 * M, 6 * M) == [HOST_FAULT, HIT]
    assert touch(r, 0, PAGE, 2 * PAGE) == [MAPPED, HOST_FAULT, MAPPED]
    r.vm.check()


def test_map_with_other_attributes(r):
    """The same page with another memory type: its shadows go, and come back with that."""
    assert touch(r, 0) == [MAPPED]
    (before,) = r.shadow()
    change = r.vm.host.map(DATA, HOST + DATA, PAGE, memattr=5)
    assert change.leaves == 1
    assert r.vm.host.leaves()[["cipa", "memattr"]].tolist().count((DATA, 5)) == 1
    assert touch(r, 0) == [MAPPED]
    (row,) = r.shadow()
    assert (before["memattr"], row["memattr"]) == (6, 5)
    assert r.vm.host.map(DATA, HOST + DATA, PAGE, memattr=5).leaves == 0
    r.vm.check()


@pytest.mark.parametrize("page", [0, 1, 255, 510, 511])
def test_protect_one_page_of_a_block(r, page):
    """Wherever in the host's block the page is, a shadow of the whole block goes, and the pages beside keep all."""
    assert r.fault(4 * M, WRITE).size == 2 * M
    at = DATA + 4 * M + page * PAGE
    assert r.vm.host.protect(at, at + PAGE, "r").leaves == 1
    r.vm.check()
    assert r.leaves() == []
    for n in range(512):
        assert r.fault(4 * M + n * PAGE, WRITE).kind == (HOST_FAULT if n == page else MAPPED)
    r.vm.check()


def test_protect_grants(r):
    """Permissions only added: shadows are left as they are and gain on their next fault."""
    r.vm.host.protect(RAM, RAM + 64 * M, "r")
    touch(r, 0, 4 * M)
    assert r.vm.host.protect(RAM, RAM + 64 * M, "rwx").leaves == 0
    assert r.shadow()["perm"].tolist() == [READ, READ]
    assert touch(r, 0, 4 * M, access=WRITE) == [MAPPED, MAPPED]
    assert r.shadow()["perm"].tolist() == [RWX, RWX]
    r.vm.check()


def test_protect_nothing_mapped():
    """Where there is no host leaf there is nothing to protect, and nothing appears."""
    r = Rig(host=False)
    r.vm.host.protect(RAM, RAM + M, "r")
    assert r.host_leaves() == []


# load


def captured_host():
    """(addresses, pages, VTTBR, VTCR) of a real L0's table, and the snapshot."""
    snap = snapshots.load("g_nested_7.2/10_final")
    pages = snap.pages()
    addresses = np.array(list(pages), dtype=np.uint64)
    words = np.array(list(pages.values()), dtype="<u8").view(np.uint8)
    return snap, (addresses, words, *snapshots.regs(snap.registers["l0_table_for_l1"]))


def test_load_takes_over(r):
    """A loaded table takes the place of what was there: shadows of that go; loading it again changes nothing."""
    touch(r, 0, 4 * M)
    snap, table = captured_host()
    r.vm.host.load(*table)
    assert len(r.shadow()) == 0
    loaded = {(ipa, pa, size) for ipa, pa, size, *_ in snap.scan("tables", *table[2:]).leaves}
    assert loaded <= {leaf[:3] for leaf in r.host_leaves()}
    r.vm.check()
    before = r.host_leaves()
    r.vm.host.load(*table)
    assert r.host_leaves() == before
    r.vm.check()


def test_load_captured_table():
    """A real L0's table for L1 is taken over leaf by leaf."""
    snap, table = captured_host()
    vttbr, vtcr = table[2:]
    r = Rig(host=False)
    r.vm.host.load(*table)
    want = [
        (ipa, pa, size, desc >> 6 & 3 | (36 if desc >> 53 & 3 == 0 else 0), desc >> 2 & 15)
        for ipa, pa, size, _level, desc in snap.scan("tables", vttbr, vtcr).leaves
    ]
    got = r.vm.host.leaves()
    assert [tuple(row[n].item() for n in ("cipa", "pa", "size", "perm", "memattr")) for row in got] == want
    assert len(want) == snap.registers["l0_table_for_l1"]["leaves"]
    r.vm.check()


# the other policies


@pytest.mark.parametrize("teardown", ["blow-away", "blow-away-lean"])
def test_blow_away(teardown):
    """As Linux does it: any unmap drops every leaf of every context, and a partly covered block whole."""
    r = Rig(teardown=teardown)
    r.tables.map_range(0, DATA, 4 * M)
    for vmid in (1, 2):
        r.load(vmid)
        touch(r, 0, PAGE, 3 * M)
    change = r.vm.unmap(DATA, DATA + PAGE)
    assert change.leaves == 6
    assert [len(r.shadow(n)) for n in (0, 1)] == [0, 0]
    assert touch(r, 0, PAGE, 3 * M) == [HOST_FAULT, HOST_FAULT, MAPPED]
    assert sum(leaf[2] for leaf in r.host_leaves()) == 62 * M
    r.vm.check()


@pytest.mark.parametrize("teardown", ["interval-map", "blow-away", "blow-away-lean"])
def test_narrowing_without_a_reverse_map(teardown):
    """protect and dirty logging take W from every leaf of every context; no stale W is left where it matters."""
    r = Rig(teardown=teardown)
    r.tables.map_range(0, DATA, 4 * M)
    for vmid in (1, 2):
        r.load(vmid)
        touch(r, 0, PAGE, 3 * M, access=WRITE)
    r.vm.log_dirty(DATA, DATA + PAGE)
    for n in (0, 1):
        perms = {row["ipa"].item(): row["perm"].item() for row in r.shadow(n)}
        assert not perms.get(0, 0) & WRITE
    assert touch(r, 0, access=WRITE) == [MAPPED]
    assert rig.flags(r.vm.dirty_log(DATA, DATA + PAGE), 1) == [True]
    r.vm.host.protect(DATA + PAGE, DATA + 2 * PAGE, "r")
    assert touch(r, PAGE, access=WRITE) == [HOST_FAULT]
    r.vm.check()


def test_blow_away_reverse():
    """Without a reverse map the question is still answered, by a scan."""
    r = Rig(teardown="blow-away")
    r.tables.map_range(0, DATA, 4 * M)
    r.tables.map(64 * M, DATA)
    touch(r, 0, PAGE, 64 * M)
    rows = r.vm.reverse(DATA + 0x123)
    assert sorted((row["context"].item(), row["ipa"].item(), row["size"].item()) for row in rows) == [
        (0, 0, PAGE),
        (0, 64 * M, PAGE),
    ]


def test_policies_agree():
    """The same accesses and changes end in the same host table and the same translations under every policy."""
    outcomes = []
    for teardown in s2shadow.TEARDOWNS:
        r = Rig(teardown=teardown)
        r.tables.map_range(0, DATA, 4 * M)
        rng = np.random.default_rng(7)
        for _ in range(200):
            r.fault(int(rng.integers(0, 1024)) * PAGE, int(rng.choice([READ, WRITE])))
            if rng.random() < 0.2:
                page = DATA + int(rng.integers(0, 1024)) * PAGE
                r.vm.unmap(page, page + PAGE, partial="split")
        kinds = touch(r, *range(0, 4 * M, PAGE), access=WRITE)
        outcomes.append((r.host_leaves(), [k == HOST_FAULT for k in kinds]))
        r.vm.check()
    assert all(outcome == outcomes[0] for outcome in outcomes)
    assert any(outcomes[0][1]) and not all(outcomes[0][1])
