"""What one sees inside: tables that an outside walker walks, the reverse map, owed maintenance, statistics, memory."""

import dataclasses

import numpy as np
import pytest

import s2shadow
from rig import DATA, HOST, PAGE, RAM, G, K, M, Rig, Tables
from s2shadow import HIT, HOST_FAULT, MAPPED, READ, WRITE

VMALLS12, IPA, ALL = 0, 1, 5


@pytest.fixture
def r():
    """Three contexts over a mix of pages and blocks."""
    r = Rig(contexts=4)
    r.tables.map_range(0, DATA, 4 * M)
    r.tables.map_range(4 * M, DATA + 4 * M, 4 * M, level=2, perm="rx")
    r.tables.map_range(64 * M, DATA, 64 * PAGE, perm="r")
    for options in ({"vmid": 2}, {"vmid": 3, "hcr": 0}, {"vmid": 1}):
        r.load(**options)
        for n in range(0, 8 * M, 200 * K):
            r.fault(n & -PAGE, READ)
            r.fault((64 * M + n // 64) & -PAGE, READ)
            r.fault((DATA + n) & -PAGE, WRITE)
    return r


# tables


def outside(vm, index):
    """A memory that holds a table of the engine's as another machine would see it."""
    addresses, pages = vm.tables(index)
    mem = s2shadow.GuestMemory()
    for address, page in zip(addresses.tolist(), pages, strict=True):
        mem.add(address, buffer=np.ascontiguousarray(page))
    return mem


@pytest.mark.parametrize("index", [0, 1, 2])
def test_shadow_walks(r, index):
    """Another walker, given the tables and the registers, finds exactly the live entries."""
    ctx = r.vm.contexts[index]
    cfg = s2shadow.Stage2Config(ctx.host_vttbr, ctx.host_vtcr, features=r.features, hcr=ctx.host_hcr)
    assert cfg.error is None and cfg.vmid == ctx.host_vmid
    found = s2shadow.leaves(outside(r.vm, index), cfg)
    names = ["ipa", "pa", "size", "desc", "level", "perm", "memattr", "sh"]
    assert found[names].tolist() == r.shadow(index)[names].tolist()
    assert len(found) == ctx.entries > 0


def test_canonical_walks(r):
    """So does the canonical table, root first and as wide as the machine: it gives vm.host.leaves()."""
    addresses, pages = r.vm.tables()
    assert pages.shape == (len(addresses), PAGE) and pages.dtype == np.uint8 and addresses.dtype == np.uint64
    cfg = s2shadow.Stage2Config(int(addresses[0]), 16 | 2 << 6 | 5 << 16, features=r.features)
    found = s2shadow.leaves(outside(r.vm, None), cfg)
    host = r.vm.host.leaves()
    assert [found["ipa"].tolist(), found["pa"].tolist(), found["size"].tolist(), found["perm"].tolist()] == [
        host["cipa"].tolist(), host["pa"].tolist(), host["size"].tolist(), host["perm"].tolist(),
    ]  # fmt: skip


def test_outside_walks_one_by_one(r):
    """Single walks of the shadow give what fault gives."""
    ctx = r.vm.contexts[r.load(1).index]
    mem = outside(r.vm, ctx.index)
    cfg = s2shadow.Stage2Config(ctx.host_vttbr, ctx.host_vtcr, features=r.features, hcr=ctx.host_hcr)
    for row in r.shadow(ctx.index):
        ipa = row["ipa"].item() + 0x9A8
        f = r.fault(ipa, READ)
        w = s2shadow.walk(mem, cfg, ipa, READ, update=False)
        assert (w.status, w.pa, w.size, w.perm) == (0, f.pa, f.size, f.perm)
        assert s2shadow.walk(mem, cfg, ipa, WRITE, update=False).status == (not f.perm & WRITE)


def test_tables_are_a_copy(r):
    """Scribbling over what tables() returned changes nothing."""
    _, pages = r.vm.tables(0)
    pages[:] = 0xFF
    r.vm.check()


@pytest.mark.parametrize("granule", [16 * K, 64 * K])
def test_other_host_granules_walk(granule):
    """Shadows in 16K and 64K granules can be walked from outside as well."""
    r = Rig(features=s2shadow.Features(host_granule=granule), granule=granule)
    r.tables.map_range(0, DATA & -granule, 64 * granule)
    for n in range(0, 64, 5):
        assert r.fault(n * granule).kind == MAPPED
    ctx = r.vm.contexts[0]
    cfg = s2shadow.Stage2Config(ctx.host_vttbr, ctx.host_vtcr, features=r.features, hcr=ctx.host_hcr)
    assert cfg.granule == granule and cfg.error is None
    assert s2shadow.leaves(outside(r.vm, 0), cfg)["ipa"].tolist() == r.shadow()["ipa"].tolist()


def test_table_addresses(r):
    """Simulated addresses: aligned, all different, and from table_base upwards if that is given."""
    seen = [a for n in (None, 0, 1, 2) for a in r.vm.tables(n)[0].tolist()]
    assert len(set(seen)) == len(seen) and all(a % PAGE == 0 for a in seen)
    r = Rig(table_base=1 << 40)
    r.tables.map(0, DATA)
    r.fault(0)
    assert all((1 << 40) <= a < (1 << 41) for n in (None, 0) for a in r.vm.tables(n)[0].tolist())


# reverse


def test_reverse(r):
    """Every leaf over a page, by context and nested address: as a scan of all contexts finds them."""
    for page in range(DATA, DATA + 8 * M, 100 * K):
        page &= -PAGE
        scan = {
            (c.index, row["ipa"].item(), row["size"].item())
            for c in r.vm.contexts
            for row in r.shadow(c.index)
            if row["cipa"] <= page < row["cipa"] + row["size"]
        }
        rows = r.vm.reverse(page + 0x7F8)
        assert {tuple(row[n].item() for n in ("context", "ipa", "size")) for row in rows} == scan
        assert len(rows) == len(scan)
    assert rows.dtype == s2shadow.REVERSE_DTYPE


def test_reverse_of_nothing(r):
    """Addresses that nobody maps, or that cannot exist."""
    for cipa in (0, RAM, 1 << 47, (1 << 48) - 1):
        assert len(r.vm.reverse(cipa)) == 0


def test_shadow_sorted(r):
    """shadow() is sorted by address."""
    for index in range(3):
        ipas = r.shadow(index)["ipa"].tolist()
        assert ipas == sorted(ipas)
    assert r.shadow().dtype == s2shadow.SHADOW_DTYPE


# owed maintenance


def covers(rows, host_vmid, ipa, size):
    """True if these rows take the translations of this leaf from the hardware."""
    return any(
        row["op"] == ALL
        or (row["host_vmid"] == host_vmid and row["op"] == VMALLS12)
        or (row["host_vmid"] == host_vmid and row["op"] == IPA and row["start"] <= ipa and ipa + size <= row["end"])
        for row in rows
    )


def leaves_by_vmid(r):
    return {
        (c.host_vmid, row["ipa"].item(), row["size"].item()): row["perm"].item()
        for c in r.vm.contexts
        for row in r.shadow(c.index)
    }


CHANGES = {
    "unmap": lambda r: r.vm.unmap(DATA + M, DATA + 5 * M),
    "unmap a page": lambda r: r.vm.unmap(DATA + M & -PAGE, (DATA + M & -PAGE) + PAGE),
    "map": lambda r: r.vm.host.map(DATA, 2 * HOST, 3 * M),
    "protect": lambda r: r.vm.host.protect(DATA, DATA + 6 * M, "r"),
    "log": lambda r: r.vm.log_dirty(DATA, DATA + 8 * M),
    "tlbi": lambda r: r.vcpu.tlbi("VMALLS12E1IS"),
    "tlbi all": lambda r: r.vcpu.tlbi("ALLE1"),
    "tlbi ipa": lambda r: r.vcpu.tlbi("IPAS2E1IS", (4 * M) >> 12),
}


@pytest.mark.parametrize("change", CHANGES)
def test_owed(r, change):
    """Every leaf that went or lost a permission is covered by what is owed up to the change's ticket."""
    r.vm.take_tlbis()
    before = leaves_by_vmid(r)
    result = CHANGES[change](r)
    after = leaves_by_vmid(r)
    rows = r.vm.take_tlbis()
    assert rows.dtype == s2shadow.HW_TLBI_DTYPE
    ticket = getattr(result, "ticket", None)
    if ticket is not None:
        rows = rows[rows["seq"] <= ticket]
    lost = [key for key, perm in before.items() if perm & ~after.get(key, 0)]
    assert lost
    assert all(covers(rows, *key) for key in lost)
    assert sorted(rows["seq"].tolist()) == rows["seq"].tolist()


def test_relax_and_replace_owed(r):
    """Adding a permission owes at most a refresh; another address in the same place owes break-before-make."""
    where = r.tables.slot(0, 3)
    r.load(1)
    r.fault(0, READ)
    r.vm.take_tlbis()
    r.tables.set(where, r.tables.leaf(DATA + 9 * PAGE, 3))
    r.vcpu.tlbi("IPAS2E1IS", 99)
    r.tables.set(where, r.tables.leaf(DATA + 9 * PAGE, 3))
    ctx = r.vm.contexts[r.load(1).index]
    r.tables.map(PAGE, DATA + PAGE, perm="r")
    r.fault(PAGE, READ)
    r.vm.take_tlbis()
    r.tables.map(PAGE, DATA + 11 * PAGE, perm="rw")
    assert r.fault(PAGE, WRITE).cipa == DATA + 11 * PAGE
    assert covers(r.vm.take_tlbis(), ctx.host_vmid, PAGE, PAGE)


def test_tickets_grow(r):
    """Each change has a later ticket; its rows have that number."""
    r.vm.take_tlbis()
    tickets = []
    for n in range(5):
        page = DATA + n * 200 * K & -PAGE
        tickets.append(r.vm.unmap(page, page + PAGE).ticket)
    assert tickets == sorted(set(tickets))
    seqs = set(r.vm.take_tlbis()["seq"].tolist())
    assert seqs and seqs <= set(tickets)


def test_take_in_parts(r):
    """limit takes the oldest first and leaves the rest."""
    r.vm.take_tlbis()
    for n in range(8):
        page = DATA + n * 200 * K & -PAGE
        r.vm.unmap(page, page + PAGE)
    first = r.vm.take_tlbis(limit=3)
    rest = r.vm.take_tlbis()
    assert len(first) == 3 and len(rest) >= 1
    assert first["seq"].max() <= rest["seq"].min()
    assert len(r.vm.take_tlbis()) == 0


def test_tickets_stay_true_when_the_queue_collapses():
    """What a change owed is there under its ticket, however many came after it before anybody took the rows."""
    r = Rig(contexts=2)
    r.tables.map_range(0, DATA, 4 * M)
    r.fault(0)
    r.vm.take_tlbis()
    ticket = r.vm.unmap(DATA, DATA + PAGE).ticket
    for n in range(1, 1024):
        for _ in range(6):
            r.fault(n * PAGE)
            r.vm.host.map(DATA + n * PAGE, 2 * HOST + n * PAGE, PAGE)
            r.fault(n * PAGE)
            r.vm.host.map(DATA + n * PAGE, HOST + DATA + n * PAGE, PAGE)
    rows = r.vm.take_tlbis()
    assert len(rows) < 10_000, "the queue did not collapse"
    assert covers(rows[rows["seq"] <= ticket], r.vm.contexts[0].host_vmid, 0, PAGE)


def test_queue_collapses():
    """A queue that nobody drains stays small and still covers everything: one VMALLS12 per context in the end."""
    r = Rig(contexts=2)
    r.tables.map_range(0, DATA, 4 * M)
    for _ in range(100):
        for n in range(1024):
            r.fault(n * PAGE)
        for n in range(0, 1024, 2):
            r.vm.host.map(DATA + n * PAGE, 2 * HOST + n * PAGE, PAGE)
            r.vm.host.map(DATA + n * PAGE, HOST + DATA + n * PAGE, PAGE)
    rows = r.vm.take_tlbis()
    assert len(rows) < 50_000
    assert covers(rows, r.vm.contexts[0].host_vmid, 0, 4 * M) or len(rows) > 1000


def test_not_tracked():
    """track_tlbis=False owes nothing."""
    r = Rig(track_tlbis=False)
    r.tables.map(0, DATA)
    r.fault(0)
    assert r.vm.unmap(DATA, DATA + PAGE).leaves == 1
    assert len(r.vm.take_tlbis()) == 0


# statistics and memory


def test_stats(r):
    """The counters add up, and are a snapshot that nobody can change."""
    s = r.vm.stats
    assert s.installed - s.removed == s.live == sum(c.entries for c in r.vm.contexts)
    assert s.faults == s.hits + s.mapped + s.l1_faults + s.host_faults + s.mmio + s.retries + s.no_memory
    assert s.host_leaves == len(r.vm.host.leaves())
    assert s.memory_bytes == s.table_bytes + s.link_bytes + s.rmap_bytes
    with pytest.raises((AttributeError, dataclasses.FrozenInstanceError)):
        s.live = 0
    r.fault(0)
    assert r.vm.stats.faults == s.faults + 1


def test_stats_by_kind():
    """Each kind of answer is counted once."""
    r = Rig()
    r.tables.map(0, DATA)
    r.tables.map(PAGE, 0xA000_0000)
    r.tables.map(2 * PAGE, DATA + 64 * M)
    before = r.vm.stats
    kinds = [int(r.fault(ipa).kind) for ipa in (0, 0, 0, PAGE, 3 * PAGE, 3 * PAGE)]
    kinds += r.vcpu.fault_many([0, PAGE, 4 * PAGE], READ)["kind"].tolist()
    after = r.vm.stats
    names = ["hits", "mapped", "l1_faults", "host_faults", "mmio"]
    assert [getattr(after, n) - getattr(before, n) for n in names] == [kinds.count(k) for k in range(5)]
    assert after.faults - before.faults == 9


def test_bytes_come_back():
    """When everything is unmapped the engine holds what a fresh one holds."""
    r, fresh = Rig(host=False), Rig(host=False)
    for _ in range(2):
        r.vm.host.map(RAM, HOST, 64 * M)
        r.tables.map_range(0, DATA, 4 * M)
        for n in range(1024):
            r.fault(n * PAGE, WRITE)
        r.vm.log_dirty(RAM, RAM + 64 * M)
        for n in range(0, 1024, 3):
            r.fault(n * PAGE, WRITE)
        r.vm.log_dirty(RAM, RAM + 64 * M, on=False)
        assert r.vm.stats.memory_bytes > fresh.vm.stats.memory_bytes
        r.vm.unmap(0, 1 << 48)
    got, want = r.vm.stats, fresh.vm.stats
    for name in ("live", "host_leaves", "table_bytes", "link_bytes", "rmap_bytes", "memory_bytes"):
        assert getattr(got, name) == getattr(want, name), name
    r.vm.check()


def test_bytes_per_mapping():
    """Reverse map on a dense shadow of 65,536 pages: at most 12.5 bytes a page."""
    r = Rig(host=False)
    r.mem.add(4 * G, 256 * M)
    r.vm.host.populate = s2shadow.Linear(max_block=PAGE)
    r.tables = r.new_tables()
    r.tables.next = RAM + 4 * M
    r.tables.map_range(0, 4 * G, 256 * M)
    r.load(1)
    got = r.vcpu.fault_many(np.arange(65536, dtype=np.uint64) * PAGE, WRITE)
    assert (got["kind"] == MAPPED).all()
    s = r.vm.stats
    assert s.live == 65536
    assert (s.link_bytes + s.rmap_bytes) / s.live <= 12.5


def test_max_table_bytes():
    """A limit evicts what is cold and never raises; every answer stays right."""
    r = Rig(host=False, max_table_bytes=2 * M)
    r.vm.host.populate = s2shadow.Linear(offset=HOST, max_block=2 * M)
    r.tables.map_range(0, DATA, 60 * M)
    r.tables.map_range(G, DATA, 60 * M)
    for vmid in (1, 2, 1):
        r.load(vmid)
        for ipa in range(0, 60 * M, 64 * K):
            for alias in (0, G):
                f = r.fault(ipa + alias, WRITE)
                assert (f.kind, f.pa) == (MAPPED, HOST + DATA + ipa) or f.kind == HIT
                assert r.vm.stats.memory_bytes <= 2 * M
    r.vm.check()


def test_max_table_bytes_evicts():
    """Under the limit something had to go, and is counted; it comes back when touched."""
    r = Rig(host=False, max_table_bytes=512 * K)
    r.vm.host.populate = s2shadow.Linear(offset=HOST)
    tables = r.new_tables()
    tables.next = RAM + 4 * M
    for n in range(256):
        tables.map(n * 2 * M, DATA + n * PAGE)
    r.load(1, tables)
    for n in range(256):
        assert r.fault(n * 2 * M, WRITE).kind == MAPPED
    assert r.vm.stats.evictions > 0
    assert r.vm.stats.memory_bytes <= 512 * K
    assert all(r.fault(n * 2 * M, WRITE).pa == HOST + DATA + n * PAGE for n in range(256))
    r.vm.check()


@pytest.mark.parametrize("limit", [0, 1, PAGE, 3 * PAGE])
def test_max_table_bytes_too_small(limit):
    """Below one full walk path per vCPU: refused."""
    with pytest.raises(ValueError, match="max_table_bytes"):
        s2shadow.NestedVM(s2shadow.GuestMemory(), vcpus=4, max_table_bytes=limit)


def test_check_passes_when_busy(r):
    """check() on a busy engine, after each kind of change."""
    for change in CHANGES.values():
        r.vm.check()
        change(r)
    r.vm.check()
    assert r.fault(0).kind in (MAPPED, HOST_FAULT)


def test_a_node_of_the_reverse_map_that_went_and_came_back_elsewhere():
    """A host table remembers the node of its block; with the last leaf there it goes, and another block gets it."""
    r = Rig(host=False)
    for page in range(4):
        for block in (0, 2 * M):
            r.vm.host.map(DATA + block + page * PAGE, HOST + DATA + block + page * PAGE, PAGE)
    r.tables.map_range(0, DATA, 4 * PAGE)
    r.tables.map_range(2 * M, DATA + 2 * M, 4 * PAGE)
    for first, second in ((0, 2 * M), (2 * M, 0)):
        assert r.fault(first).kind == MAPPED
        r.vcpu.tlbi("ALLE1IS")
        for ipa in (second, second + PAGE, first + PAGE, first):
            assert r.fault(ipa).kind == MAPPED
            r.vm.check()
        r.vcpu.tlbi("ALLE1IS")


def test_owed_for_a_table_that_goes_along():
    """With the last leaf of a table the way to it is void too: a TLBI of the last level alone would not do."""
    r = Rig()
    r.tables.map_range(0, DATA, 2 * PAGE)
    r.fault(0)
    r.fault(PAGE)
    r.vm.take_tlbis()
    for page, last_level in ((0, 1), (1, 0)):
        assert r.vm.unmap(DATA + page * PAGE, DATA + (page + 1) * PAGE).leaves == 1
        rows = r.vm.take_tlbis()
        over = rows[(rows["op"] == IPA) & (rows["start"] <= page * PAGE) & (page * PAGE < rows["end"])]
        assert min(over["last_level"].tolist()) == last_level


def test_links_of_a_root_that_was_empty():
    """Leaves that stand in a root have links there, which go with the last of them and are counted again with the next,
    in whatever way it comes."""
    mem = s2shadow.GuestMemory()
    mem.add(RAM, 16 * G)
    vm = s2shadow.NestedVM(mem, vcpus=2, contexts=2)
    vm.host.map(RAM, HOST + RAM, 8 * G)
    tables = Tables(mem.read64, mem.write64, RAM + 9 * G)
    tables.map_range(0, RAM, 4 * G, 1)
    for n in range(2):
        vm.vcpus[n].load(tables.vttbr(7 + n), tables.vtcr)
    for block in range(4):                  # that others have the same blocks keeps the nodes of the reverse map
        assert vm.vcpus[1].fault(block * G).size == G
    for _ in range(3):
        for block in range(4):
            assert vm.vcpus[0].fault(block * G).kind == MAPPED
        assert vm.stats.link_bytes == 2 * 512 * 8
        for block in range(4):
            assert vm.vcpus[0].tlbi("IPAS2LE1IS", block * G >> 12).removed == 1
        assert not len(vm.shadow(0)) and vm.stats.link_bytes == 512 * 8
    vm.check()
